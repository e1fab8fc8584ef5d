"""Configs of the engines, one module each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.registry import Registry

if TYPE_CHECKING:
    from dtune.parallel.footprint import Footprint, Planned
    from dtune.runtime.schema import Precision
    from dtune.runtime.world import World
    from dtune.types import Engine


@dataclass
class ParallelConfig:
    """How the model is spread over ranks."""

    name: str = "???"

    def build(self, world: World, precision: Precision) -> Engine:
        """Import and construct the engine."""
        raise NotImplementedError(type(self))

    def footprint(self, planned: Planned) -> Footprint:
        """Bytes that the fullest rank holds, besides activations."""
        raise NotImplementedError(type(self))


PARALLEL: Registry[ParallelConfig] = Registry("parallel", ParallelConfig, __name__)
