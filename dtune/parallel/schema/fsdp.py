"""FSDP2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.errors import ConfigError
from dtune.parallel.schema import PARALLEL, ParallelConfig

if TYPE_CHECKING:
    from dtune.parallel.footprint import Footprint, Planned
    from dtune.parallel.traffic import Collective
    from dtune.runtime.schema import Precision
    from dtune.runtime.world import World
    from dtune.types import Engine


@PARALLEL.register
@dataclass
class FsdpConfig(ParallelConfig):
    """Parameters, gradients and optimizer state sharded by torch's ``fully_shard``."""

    name: str = "fsdp"
    # Free a block's gathered parameters after its forward and gather them again for backward.
    reshard_after_forward: bool = True
    # Ranks that hold one replica (HSDP); 0: one replica over all ranks.
    shard_size: int = 0
    # Keep shards, gradients and optimizer state in host memory.
    cpu_offload: bool = False

    def __post_init__(self) -> None:
        if self.shard_size < 0:
            raise ConfigError(
                f"parallel.shard_size={self.shard_size} must be 0 (all ranks) or a divisor of the "
                "number of ranks"
            )

    def build(self, world: World, precision: Precision) -> Engine:
        """Import and construct the engine."""
        from dtune.parallel.fsdp import FsdpEngine

        return FsdpEngine(self, world, precision)

    def footprint(self, planned: Planned) -> Footprint:
        """Bytes that the fullest rank holds, besides activations."""
        from dtune.parallel.footprint import of_fsdp

        return of_fsdp(
            planned,
            shards=self.shard_size or planned.ranks,
            reshards=self.reshard_after_forward,
            on_host=self.cpu_offload,
        )

    def traffic(self, planned: Planned, *, micros: int) -> list[Collective]:
        """What a rank sends in one optimizer step of so many micro batches."""
        from dtune.parallel.traffic import of_fsdp

        shards = self.shard_size or planned.ranks
        return of_fsdp(planned, shards=shards, reshards=self.reshard_after_forward, micros=micros)
