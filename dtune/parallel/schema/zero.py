"""DeepSpeed ZeRO."""

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


@dataclass
class ZeroConfig(ParallelConfig):
    """ZeRO, Rajbhandari et al. 2019, arXiv:1910.02054, by DeepSpeed."""

    # Keep optimizer state (and with stage 3 the parameters) in host memory.
    cpu_offload: bool = False
    # Size in elements of the buckets that gradients are reduced in.
    reduce_bucket_size: int = 50_000_000
    # Stage 3: parameters of at most so many elements (bytes of a quantised base) stay gathered.
    param_persistence_threshold: int = 100_000

    def __post_init__(self) -> None:
        if self.reduce_bucket_size < 1:
            raise ConfigError(
                f"parallel.reduce_bucket_size={self.reduce_bucket_size} must be at least 1"
            )
        if self.param_persistence_threshold < 0:
            raise ConfigError(
                f"parallel.param_persistence_threshold={self.param_persistence_threshold} must "
                "not be negative; set 0 to shard every parameter"
            )

    @property
    def stage(self) -> int:
        """1: optimizer state, 2: and gradients, 3: and parameters are sharded."""
        return int(self.name.removeprefix("zero"))

    def build(self, world: World, precision: Precision) -> Engine:
        """Import and construct the engine."""
        from dtune.parallel.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(self, world, precision)

    def footprint(self, planned: Planned) -> Footprint:
        """Bytes that the fullest rank holds, besides activations."""
        from dtune.parallel.footprint import of_zero

        return of_zero(
            planned, stage=self.stage, bucket=self.reduce_bucket_size, on_host=self.cpu_offload
        )

    def traffic(self, planned: Planned, *, micros: int) -> list[Collective]:
        """What a rank sends in one optimizer step of so many micro batches."""
        from dtune.parallel.traffic import of_zero

        kept = self.param_persistence_threshold
        return of_zero(planned, stage=self.stage, persistent=kept, micros=micros)


@PARALLEL.register
@dataclass
class Zero1Config(ZeroConfig):
    """Optimizer state sharded."""

    name: str = "zero1"


@PARALLEL.register
@dataclass
class Zero2Config(ZeroConfig):
    """Optimizer state and gradients sharded."""

    name: str = "zero2"


@PARALLEL.register
@dataclass
class Zero3Config(ZeroConfig):
    """Optimizer state, gradients and parameters sharded."""

    name: str = "zero3"
