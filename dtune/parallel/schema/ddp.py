"""Replicas with averaged gradients."""

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
class DdpConfig(ParallelConfig):
    """Each rank holds the whole model; gradients are reduced in buckets."""

    name: str = "ddp"
    # Size of a gradient bucket in MiB; buckets are reduced while the backward pass goes on.
    bucket_mib: int = 25
    # Beside a frozen base, gradients of at most so many MiB in all are reduced as one bucket.
    one_bucket_mib: int = 1024

    def __post_init__(self) -> None:
        if self.bucket_mib < 1:
            raise ConfigError(f"parallel.bucket_mib={self.bucket_mib} must be at least 1")
        if self.one_bucket_mib < 0:
            raise ConfigError(
                f"parallel.one_bucket_mib={self.one_bucket_mib} must not be negative; set 0 to "
                "reduce in buckets of parallel.bucket_mib always"
            )

    def build(self, world: World, precision: Precision) -> Engine:
        """Import and construct the engine."""
        from dtune.parallel.ddp import DdpEngine

        return DdpEngine(self, world, precision)

    def footprint(self, planned: Planned) -> Footprint:
        """Bytes that the fullest rank holds, besides activations."""
        from dtune.parallel.footprint import of_replica

        return of_replica(planned, one_bucket=self.one_bucket_mib << 20)

    def traffic(self, planned: Planned, *, micros: int) -> list[Collective]:
        """What a rank sends in one optimizer step of so many micro batches."""
        from dtune.parallel.traffic import of_ddp

        return of_ddp(planned, one_bucket=self.one_bucket_mib << 20)
