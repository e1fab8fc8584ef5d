"""Where virtual tokens stand in a batch: before every row, or before every packed document.

Shape legend: B rows of S tokens as given, R rows of W positions with virtual tokens among them,
N virtual tokens, D documents; trailing dims are any.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dtune.types import NUM_DOCUMENTS


@dataclass(frozen=True)
class Arrangement:
    """Rows that hold the tokens of a batch, and virtual tokens before each document."""

    given: tuple[int, int]
    """B and S."""
    shape: tuple[int, int]
    """R and W."""
    tokens: torch.Tensor
    """Place of each token among R * W positions: int64 [B * S]."""
    virtual: torch.Tensor
    """Places of the virtual tokens, document by document: int64 [D * N]."""
    packed: bool
    """Whether rows hold several documents."""

    def spread(self, own: torch.Tensor, virtual: torch.Tensor, *, rest: int = 0) -> torch.Tensor:
        """Put ``own`` [B, S, ...] and, before each document, ``virtual`` [N, ...] in their places.

        Returns [R, W, ...] in the dtype of ``own``; positions that nothing takes hold ``rest``.
        """
        dims = own.shape[2:]
        whole = own.new_full((self.shape[0] * self.shape[1], *dims), rest)
        whole = whole.index_copy(0, self.tokens, own.flatten(0, 1))
        count = len(self.virtual) // len(virtual)
        # Not an index that repeats: its backward adds in an order that a GPU does not fix.
        copies = virtual.to(own.dtype).expand(count, *virtual.shape).flatten(0, 1)
        return whole.index_copy(0, self.virtual, copies).view(*self.shape, *dims)

    def pick(self, whole: torch.Tensor) -> torch.Tensor:
        """[R, W, ...] -> what stands at the tokens: [B, S, ...]."""
        # Not a view, on which a change in place would undo what an engine hangs on a result.
        if not self.packed:
            return whole.index_select(1, self.tokens[: self.given[1]])
        return whole.flatten(0, 1)[self.tokens.view(self.given)]


def arrange(arguments: Mapping[str, Any], batch: tuple[int, int], num: int) -> Arrangement:
    """Say where tokens and ``num`` virtual tokens go, for the arguments of a causal model."""
    starts = _document_starts(arguments, batch)
    if starts is not None:
        return _before_documents(starts, arguments.get(NUM_DOCUMENTS), num)
    rows, length = batch
    device = _device_of(arguments)
    width = num + length
    offsets = width * torch.arange(rows, device=device)[:, None]
    return Arrangement(
        given=batch,
        shape=(rows, width),
        tokens=(offsets + num + torch.arange(length, device=device)).flatten(),
        virtual=(offsets + torch.arange(num, device=device)).flatten(),
        packed=False,
    )


def _device_of(arguments: Mapping[str, Any]) -> torch.device:
    ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
    found = ids if ids is not None else embeds
    assert isinstance(found, torch.Tensor), "neither input_ids nor inputs_embeds"
    return found.device


def _document_starts(arguments: Mapping[str, Any], batch: tuple[int, int]) -> torch.Tensor | None:
    """Whether a document starts at each position, bool [B, S]; None where each row is one.

    Rows are packed where there is no mask, no cache, and positions restart.
    """
    position_ids = arguments.get("position_ids")
    cached = arguments.get("past_key_values") is not None or arguments.get("use_cache") is not False
    if position_ids is None or arguments.get("attention_mask") is not None or cached:
        return None
    if arguments.get(NUM_DOCUMENTS) == batch[0]:
        return None
    position_ids = position_ids.expand(batch)
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff(dim=1) != 1
    return starts


def _shares_one_row(device: torch.device) -> bool:
    return device.type != "cpu"


def _before_documents(starts_BS: torch.Tensor, count: int | None, num: int) -> Arrangement:
    """Give every document its own virtual tokens.

    The number of positions is a shape, for which the host must not wait: on a device all documents
    go into one row, whose length follows from their ``count``. On the CPU, where nothing is waited
    for and attention computes every score of a row, rows stay rows.
    """
    rows, length = starts_BS.shape
    device = starts_BS.device
    places = torch.arange(rows * length, device=device)
    if count is None:
        count = int(starts_BS.sum())
    if not _shares_one_row(device):
        shape = rows, length + num * int(starts_BS.sum(1).max())
        columns = torch.arange(length) + num * starts_BS.cumsum(1)
        tokens = (columns + shape[1] * torch.arange(rows)[:, None]).flatten()
    else:
        shape = 1, rows * length + num * count
        tokens = places + num * starts_BS.flatten().cumsum(0)
    # A stable sort puts the starts first, in order.
    order = torch.argsort((~starts_BS).flatten().to(torch.uint8), stable=True)
    first = tokens[order[:count]]
    virtual = (first[:, None] - num + torch.arange(num, device=device)).flatten()
    return Arrangement((rows, length), shape, tokens, virtual, packed=True)
