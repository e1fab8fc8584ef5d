"""What ``dtune plan`` says of a case, to be held against what is measured."""

from __future__ import annotations

from dataclasses import dataclass

from dtune.bench.ceiling import Shapes, linear_shapes
from dtune.bench.schema import BenchConfig
from dtune.bench.subject import synthetic_batches
from dtune.config.run import RunConfig
from dtune.plan.run import Planner, UncountableError
from dtune.runtime.world import World


@dataclass(frozen=True)
class Planned:
    """Counted on a model without values."""

    memory: int | None
    """Bytes that the fullest device most likely holds at its peak."""
    shapes: Shapes
    """Of the linears."""
    parameters: int
    trained: int
    notes: tuple[str, ...]


def plan_case(run: RunConfig, bench: BenchConfig, world: World) -> Planned:
    """Plan the memory of a case with the batches that it will be measured on."""
    planner = Planner(run, world.size, None, device=world.device)
    built = planner.built
    shapes = linear_shapes(built.model, built.spec)
    batch = synthetic_batches(run, bench, built, world)[0]
    memory: int | None = None
    notes: tuple[str, ...] = ()
    try:
        memory = planner.memory(run, batch).likely
    except UncountableError as error:
        notes = (f"memory is not planned: {error}",)
    return Planned(memory, shapes, built.report.total, built.report.trainable, notes)
