"""What is measured: a run built as ``dtune train`` builds it, on synthetic batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import nn

from dtune.bench.batches import BatchShape, make_batches
from dtune.bench.schema import BenchConfig, WeightsFrom
from dtune.bench.weights import DrawnOnDevice
from dtune.build import (
    STORAGE,
    BuiltModel,
    build_trained_model,
    prepare_engine,
    weights_of,
)
from dtune.config.run import RunConfig
from dtune.config.support import accumulation_steps
from dtune.errors import ConfigError
from dtune.models.load import load_tokenizer
from dtune.models.schema import Init
from dtune.objectives.causal import causal_loss
from dtune.plan.run import reachable
from dtune.runtime.schema import Precision
from dtune.runtime.world import World
from dtune.train.guard import Guard, GuardState
from dtune.train.speed import Speed, speed_of
from dtune.train.step import StepStats, train_step
from dtune.types import Batch, Engine, LossParts, Objective, TakesPartInSteps

SPARE_STEPS = 32
"""Steps that a schedule must hold besides those that are asked for: counted ones, repeated ones."""


class PlainCausal:
    """The loss that all next-token objectives share, where there is no tokenizer to build one."""

    def loss(self, model: nn.Module, batch: Batch) -> LossParts:
        """Return the sum of the cross entropies of all targets."""
        return causal_loss(model, batch)


@dataclass
class Subject:
    """A prepared engine and the batches of a step, which are the same in every step."""

    run: RunConfig
    world: World
    engine: Engine
    objective: Objective
    batches: Sequence[Batch]
    speed: Speed
    participant: TakesPartInSteps | None
    total_steps: int
    notes: tuple[str, ...] = ()
    done: int = 0
    """Optimizer steps."""
    losses: list[torch.Tensor] = field(default_factory=list)
    """Of every step, on the device."""

    def __post_init__(self) -> None:
        self.engine.model.train()
        self.guard = Guard(
            self.run.guard,
            self.world,
            scales_loss=self.engine.precision is Precision.fp16,
            state=GuardState(),
        )

    def step(self) -> StepStats:
        """Do one optimizer step, as the trainer does it."""
        self.done += 1
        stats = train_step(
            self.done,
            self.batches,
            engine=self.engine,
            objective=self.objective,
            world=self.world,
            max_norm=self.run.train.max_norm,
            guard=self.guard,
            participant=self.participant,
            total_steps=self.total_steps,
        )
        self.losses.append(stats.verdict.loss)
        return stats

    def loss_curve(self) -> tuple[float, ...]:
        """Loss of every step so far, over all ranks; waits for the device."""
        return tuple(torch.stack(self.losses).tolist())


def planned_steps(run: RunConfig, bench: BenchConfig) -> int:
    """Length of the schedule: more steps than will be done."""
    wanted = max(bench.warm_up + bench.steps, bench.falls_within) + SPARE_STEPS
    return max(wanted, run.schedule.warmup_steps + 1, run.train.max_steps)


def shape_of(run: RunConfig, bench: BenchConfig) -> BatchShape:
    """What each micro batch of a case looks like."""
    return BatchShape(
        rows=run.train.micro_batch_size,
        width=run.data.max_length,
        documents=bench.documents,
        padding=bench.padding,
        trained=bench.trained,
        packed=run.data.packing,
    )


def prepared_run(run: RunConfig, bench: BenchConfig) -> RunConfig:
    """The run with the model as it is to be measured.

    Of random weights the architecture is enough: that of a model that is out of reach is taken
    from those that dtune brings along.
    """
    if bench.weights is WeightsFrom.model:
        return run
    model = dataclasses.replace(run.model, init=Init.random)
    return dataclasses.replace(run, model=reachable(model))


def build_subject(run: RunConfig, bench: BenchConfig, world: World) -> Subject:
    """Model -> method -> quantisation -> patches -> engine, as ``assemble`` does; then batches."""
    built = build_trained_model(run, load=True, device=world.device)
    if run.model.init is Init.random and world.device.type != "cpu":
        assert built.stored is not None, "built with load=True"
        drawn = DrawnOnDevice(built.stored, world.device, STORAGE[run.precision.name])
        built = dataclasses.replace(built, stored=drawn)
    total_steps = planned_steps(run, bench)
    shape = shape_of(run, bench)
    lengths = np.array(shape.lengths, dtype=np.int64)
    speed = speed_of(built.matrices, built.spec, lengths, run.precision.name, world)
    objective, notes = _objective(run)
    engine = run.parallel.build(world, run.precision.name)
    weights = weights_of(built, seed=run.seed, start=run.peft.start)
    prepare_engine(engine, built, run, weights, total_steps)
    return Subject(
        run=run,
        world=world,
        engine=engine,
        objective=objective,
        batches=synthetic_batches(run, bench, built, world),
        speed=speed,
        participant=built.method if isinstance(built.method, TakesPartInSteps) else None,
        total_steps=total_steps,
        notes=notes,
    )


def synthetic_batches(
    run: RunConfig, bench: BenchConfig, built: BuiltModel, world: World
) -> list[Batch]:
    """The micro batches of this rank's part of a step."""
    vocabulary = int(built.spec.config.get_text_config().vocab_size)
    # Each rank has tokens of its own, as in training.
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + world.rank)
    return make_batches(
        shape_of(run, bench),
        number=accumulation_steps(run, world.size),
        vocabulary=vocabulary,
        generator=generator,
    )


def _objective(run: RunConfig) -> tuple[Objective, tuple[str, ...]]:
    """The objective of the run, or its loss alone where its tokenizer cannot be had."""
    try:
        return run.objective.build(load_tokenizer(run.model)), ()
    except ConfigError as error:
        if run.model.init is not Init.random:
            raise
        note = f"objective={run.objective.name} by its loss alone, without a tokenizer: {error}"
        # A step asks for no more than its loss.
        return cast(Objective, PlainCausal()), (note,)
