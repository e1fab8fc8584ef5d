"""What ``dtune plan`` says of a case, to be held against what is measured."""

from __future__ import annotations

from dataclasses import dataclass

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from dtune.bench.ceiling import Shapes, linear_shapes
from dtune.bench.schema import BenchConfig
from dtune.bench.subject import synthetic_batches
from dtune.build import STORAGE, build_trained_model
from dtune.config.run import RunConfig
from dtune.config.support import accumulation_steps
from dtune.plan.memory import plain_loss, plan_memory, request_of
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
    built = build_trained_model(run, load=False, device=world.device)
    shapes = linear_shapes(built.model, built.spec)
    built.quantizer.cache(built.model, STORAGE[run.precision.name])
    batch = synthetic_batches(run, bench, built, world)[0]
    accumulates = accumulation_steps(run, world.size) > 1
    request = request_of(run, built, world.size, accumulates=accumulates)
    memory: int | None = None
    notes: tuple[str, ...] = ()
    try:
        plan = plan_memory(built.model, built.spec, request, batch, plain_loss)
        memory = plan.likely
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        notes = (f"memory is not planned: {built.spec.family} decides by values ({error})",)
    return Planned(memory, shapes, built.report.total, built.report.trainable, notes)
