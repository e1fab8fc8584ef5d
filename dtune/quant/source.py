"""Bytes of quantised weights, made while they are read."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from dtune.quant.layout import CODES, Layout, Maker
from dtune.types import TensorSource


class QuantizedSource:
    """A source of float weights, and of the bytes that linears keep instead of them.

    Only what a range depends on is read and quantised. Bytes that the source has already are passed
    on. Float weights of quantised linears are read as the model computes with them.
    """

    def __init__(
        self, weights: TensorSource, layouts: Mapping[str, Layout], device: torch.device
    ) -> None:
        """Args: weights by names of the model; layouts by dotted path; device that quantises."""
        self._weights = weights
        self._layouts = dict(layouts)
        self._device = device
        # Of the linear that was read last: its parts are asked for one after another.
        self._last = ""
        self._maker: Maker | None = None

    def __contains__(self, name: str) -> bool:
        return self._part(name) is not None or name in self._weights

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        found = self._part(name)
        if found is None:
            return self._weights.shape(name)
        path, part = found
        return (self._layouts[path].sizes[part],)

    @torch.no_grad()
    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor: 1-D, CPU."""
        path, _, leaf = name.rpartition(".")
        layout = self._layouts.get(path)
        is_made = leaf == "weight" or self._part(name) is not None
        if layout is None or not is_made or f"{path}.{CODES}" in self._weights:
            return self._weights.read(name, start, stop)
        if stop <= start:
            return torch.empty(0, dtype=torch.float32 if leaf == "weight" else torch.uint8)
        maker = self._maker_of(path)
        make = layout.restore if leaf == "weight" else partial(layout.make, leaf)
        return make(start, stop, maker).cpu()

    def _part(self, name: str) -> tuple[str, str] | None:
        """Path and part of a name of bytes."""
        path, _, leaf = name.rpartition(".")
        layout = self._layouts.get(path)
        return (path, leaf) if layout is not None and leaf in layout.sizes else None

    def _maker_of(self, path: str) -> Maker:
        if self._maker is None or self._last != path:
            # Not this object: weights would outlive the load until garbage is looked for.
            read = partial(self._weights.read, f"{path}.weight")
            self._last, self._maker = path, Maker(read, self._device)
        return self._maker
