"""One process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.parallel.schema import PARALLEL, ParallelConfig

if TYPE_CHECKING:
    from dtune.parallel.footprint import Footprint, Planned
    from dtune.parallel.traffic import Collective
    from dtune.runtime.schema import Precision
    from dtune.runtime.world import World
    from dtune.types import Engine


@PARALLEL.register
@dataclass
class SingleConfig(ParallelConfig):
    """One process, one device."""

    name: str = "single"

    def build(self, world: World, precision: Precision) -> Engine:
        """Import and construct the engine."""
        from dtune.parallel.single import SingleEngine

        return SingleEngine(self, world, precision)

    def footprint(self, planned: Planned) -> Footprint:
        """Bytes that the fullest rank holds, besides activations."""
        from dtune.parallel.footprint import of_replica

        return of_replica(planned)

    def traffic(self, planned: Planned, *, micros: int) -> list[Collective]:
        """What a rank sends in one optimizer step of so many micro batches."""
        return []
