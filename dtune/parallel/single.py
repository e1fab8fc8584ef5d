"""One process, one device."""

from __future__ import annotations

from dtune.errors import ConfigError
from dtune.parallel.replica import ReplicaEngine
from dtune.parallel.schema.single import SingleConfig
from dtune.runtime.schema import Precision
from dtune.runtime.world import World


class SingleEngine(ReplicaEngine):
    """The plain engine that all others are compared with."""

    def __init__(self, config: SingleConfig, world: World, precision: Precision) -> None:
        if world.size != 1:
            raise ConfigError(
                f"parallel=single runs on one process, this run has {world.size}; set "
                "launch.nproc=1, or parallel=ddp"
            )
        super().__init__(world, precision)
