"""Cases that train methods from HF ``peft``, run by every rank of a pool."""

from __future__ import annotations

from dataclasses import dataclass

from dtune.runtime.world import World
from tests.distributed.training import Setup, build, train


@dataclass(frozen=True)
class Partitioned:
    """A curve, and how many of the trained parameters this rank does not hold between steps."""

    curve: list[tuple[float, float]]
    trained: int
    absent: int


def partitioned_curve(world: World, *, setup: Setup) -> Partitioned:
    """Train from the start; a partitioned parameter is empty outside of its module's forward."""
    engine = build(world, setup).engine
    curve = train(world, engine, setup, range(setup.steps))
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    return Partitioned(curve, len(trained), sum(p.numel() == 0 for p in trained))
