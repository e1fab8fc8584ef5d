"""Frozen weights that a linear may have: a tensor, or bytes that become one for each use."""

from __future__ import annotations

from typing import Protocol, Self

import torch


class QuantizedWeight(Protocol):
    """A weight [O, K] kept as bytes."""

    @property
    def shape(self) -> tuple[int, int]:
        """O, K."""
        ...

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [O, K], contiguous, not to be written to; by one launch at most."""
        ...

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What it is kept in, in a fixed order."""
        ...

    def with_tensors(self, tensors: tuple[torch.Tensor, ...]) -> Self:
        """Return the same weight kept in other tensors, given in that order."""
        ...


FrozenWeight = torch.Tensor | QuantizedWeight
