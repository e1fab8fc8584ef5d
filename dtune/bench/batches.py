"""Synthetic micro batches of constant shape: the same random tokens in every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dtune.types import IGNORE_INDEX, Batch


@dataclass(frozen=True)
class BatchShape:
    """What every micro batch looks like. Legend: B rows, S slots of a row."""

    rows: int
    width: int
    documents: int
    """In each row."""
    padding: float
    """Share of each row that is padding, at its end."""
    trained: float
    """Share of the tokens of a document that are trained on, at its end."""
    packed: bool
    """Whether padding is told by positions (packed rows) or by an attention mask."""

    @property
    def tokens(self) -> int:
        """Of a row, without padding."""
        return max(2 * self.documents, round(self.width * (1.0 - self.padding)))

    @property
    def lengths(self) -> list[int]:
        """Of the documents of a row: as equal as they can be."""
        each, rest = divmod(self.tokens, self.documents)
        return [each + (index < rest) for index in range(self.documents)]


def make_batches(
    shape: BatchShape, *, number: int, vocabulary: int, generator: torch.Generator
) -> list[Batch]:
    """Make the micro batches of one step of one rank, on the CPU (pinned where there is a GPU)."""
    return [_make(shape, vocabulary, generator) for _ in range(number)]


def _make(shape: BatchShape, vocabulary: int, generator: torch.Generator) -> Batch:
    rows, width = shape.rows, shape.width
    input_ids = torch.randint(0, vocabulary, (rows, width), generator=generator)
    labels = torch.full((width,), IGNORE_INDEX)
    positions = torch.zeros(width, dtype=torch.long)
    documents = torch.full((width,), -1)
    at = 0
    for number, length in enumerate(shape.lengths):
        stop = at + length
        # The first token of a document is predicted by none.
        trained = max(1, round(shape.trained * (length - 1)))
        labels[stop - trained : stop] = 0
        positions[at:stop] = torch.arange(length)
        documents[at:stop] = number
        at = stop
    start = 0 if shape.packed else at
    positions[at:] = torch.arange(start, start + width - at)
    mask = None if shape.packed else (documents >= 0).long().expand(rows, width)
    labels_BS = torch.where(labels == IGNORE_INDEX, IGNORE_INDEX, input_ids)
    return Batch(
        input_ids=_whole(input_ids),
        labels=_whole(labels_BS),
        position_ids=_whole(positions.expand(rows, width)),
        document_ids=_whole(documents.expand(rows, width)),
        attention_mask=None if mask is None else _whole(mask),
        rows=((),) * rows,
        num_tokens=rows * shape.tokens,
        num_targets=int((labels_BS != IGNORE_INDEX).sum()),
    )


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory of its own; where there is a GPU, in memory that it reads by itself."""
    whole = tensor.contiguous()
    return whole.pin_memory() if torch.cuda.is_available() else whole
