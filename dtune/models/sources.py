"""Sources made of sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dtune.types import TensorSource


class ChainedSource:
    """The first of several sources that has a tensor."""

    def __init__(self, sources: Sequence[TensorSource]) -> None:
        self._sources = tuple(sources)

    def _owner(self, name: str) -> TensorSource:
        return next(source for source in self._sources if name in source)

    def __contains__(self, name: str) -> bool:
        return any(name in source for source in self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._owner(name).shape(name)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the row-major flattened tensor: 1-D, CPU, dtype as stored."""
        return self._owner(name).read(name, start, stop)


class RenamedSource:
    """A source that is asked by other names: ``PeftMethod.stored_name`` of each."""

    def __init__(self, source: TensorSource, stored_name: Callable[[str], str]) -> None:
        self._source = source
        self._stored_name = stored_name

    def __contains__(self, name: str) -> bool:
        return self._stored_name(name) in self._source

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._source.shape(self._stored_name(name))

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the row-major flattened tensor: 1-D, CPU, dtype as stored."""
        return self._source.read(self._stored_name(name), start, stop)
