"""Configs of the engines, one module each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.registry import Registry

if TYPE_CHECKING:
    from dtune.parallel.footprint import Footprint, Planned
    from dtune.parallel.traffic import Collective
    from dtune.runtime.schema import Precision
    from dtune.runtime.world import World
    from dtune.types import Engine


AUTO = "auto"
"""The option that chooses among the others where the ranks and their memory are known."""


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

    def traffic(self, planned: Planned, *, micros: int) -> list[Collective]:
        """What a rank sends in one optimizer step of so many micro batches."""
        raise NotImplementedError(type(self))


PARALLEL: Registry[ParallelConfig] = Registry("parallel", ParallelConfig, __name__)


def engines() -> tuple[str, ...]:
    """Options of the group that are an engine, and not a choice among them."""
    return tuple(name for name in PARALLEL.names() if name != AUTO)
