"""Rows, batches, objectives and losses.

Shape legend: B rows of a micro batch, S token positions of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import nn

IGNORE_INDEX = -100
"""Label of a position that is not trained on."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One row of data in canonical form: a conversation, or plain text."""

    index: int
    origin: str
    """Where it came from, for reports: ``file.jsonl:17``."""
    messages: tuple[Message, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Example:
    """One rendered row: token ids, and for each token its label or IGNORE_INDEX (unshifted)."""

    row: int
    input_ids: list[int]
    labels: list[int]

    @property
    def num_targets(self) -> int:
        """Tokens that a causal model is trained to predict: labels after the first position."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass(frozen=True)
class Batch:
    """One micro batch. Tensors are int64 [B, S] unless said otherwise.

    ``labels`` are unshifted: the label of a token is its own id, or IGNORE_INDEX, also at the
    first token of every document. ``position_ids`` restart at 0 with every document.
    ``document_ids`` number the documents of a row from 0 and are -1 on padding: a token sees only
    tokens of its own document. ``attention_mask`` is 1 on tokens and 0 on padding, or None for
    packed rows, where position ids carry the bounds.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    rows: tuple[tuple[int, ...], ...]
    """Indices of the data rows that each batch row holds, for reports."""
    num_tokens: int
    """Tokens that are not padding."""
    num_targets: int
    """Positions that are trained on."""
    num_documents: int = -1
    """Stretches of positions that go on by one within padding or outside of it, over all rows;
    counted here where it is not given."""

    def __post_init__(self) -> None:
        if self.num_documents < 0:
            breaks = self.position_ids.diff(dim=1) != 1
            if self.attention_mask is not None:
                breaks |= self.attention_mask.diff(dim=1) != 0
            count = int(breaks.sum()) + self.position_ids.shape[0]
            object.__setattr__(self, "num_documents", count)

    @property
    def num_slots(self) -> int:
        """Positions computed, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> Batch:
        """Copy every tensor to the device, without waiting for the copy."""
        mask = self.attention_mask
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            document_ids=self.document_ids.to(device, non_blocking=True),
            attention_mask=None if mask is None else mask.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class LossParts:
    """A loss as a sum and its weight, so that the trainer normalises over the whole step."""

    total: torch.Tensor
    """Sum over trained tokens, fp32 scalar with gradient."""
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Further sums by name, detached fp32 scalars, divided by the same weight when logged."""


class Objective(Protocol):
    """What a row becomes, and what the loss is."""

    def render(self, row: Row) -> Example:
        """Tokens and labels of one row, uncut. DataError names the row that cannot be rendered."""
        ...

    def prompt(self, row: Row) -> tuple[list[int], str] | None:
        """Token ids to generate from, and the expected answer; None without a question."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> LossParts:
        """Forward and loss of one micro batch; its weight is ``batch.num_targets``."""
        ...
