"""Random weights of a model's shape, drawn on the device that trains them."""

from __future__ import annotations

import torch

from dtune.types import TensorSource


class DrawnOnDevice:
    """A source that draws on ``device``, and gives what it has drawn in the stored dtype.

    Drawing billions of values takes a CPU minutes. The values are not those of the CPU, and the
    same again for the same seed.
    """

    def __init__(self, source: TensorSource, device: torch.device, dtype: torch.dtype) -> None:
        self._source = source
        self._device = device
        self._dtype = dtype

    def __contains__(self, name: str) -> bool:
        return name in self._source

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._source.shape(name)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the row-major flattened tensor: 1-D, CPU, the stored dtype."""
        with self._device:
            return self._source.read(name, start, stop).to(self._dtype).cpu()
