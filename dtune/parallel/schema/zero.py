"""DeepSpeed ZeRO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.parallel.schema import PARALLEL, ParallelConfig

if TYPE_CHECKING:
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

    @property
    def stage(self) -> int:
        """1: optimizer state, 2: and gradients, 3: and parameters are sharded."""
        return int(self.name.removeprefix("zero"))

    def build(self, world: World, precision: Precision) -> Engine:
        """Import and construct the engine."""
        from dtune.parallel.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(self, world, precision)


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
