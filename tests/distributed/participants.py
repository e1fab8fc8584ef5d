"""Cases that train with a method that takes part in steps, run by every rank of a pool."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from dtune.objectives.causal import causal_loss
from dtune.runtime.world import World
from dtune.train.guard import Guard, GuardState
from dtune.train.guard_schema import GuardConfig
from dtune.train.participant import WithMethod
from dtune.train.step import train_step
from dtune.types import Batch, Example, LossParts, Row, TakesPartInSteps
from tests.distributed.training import Built, Setup, StateSource, build, make_batch

Point = tuple[float, float]


class Causal:
    """The loss of causal models; batches are made by the test."""

    def render(self, row: Row) -> Example:
        """Not asked for."""
        raise NotImplementedError

    def prompt(self, row: Row) -> tuple[list[int], str] | None:
        """Not asked for."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: Batch) -> LossParts:
        """Summed over tokens."""
        return causal_loss(model, batch)


@dataclass(frozen=True)
class Seen:
    """What one rank saw."""

    curve: list[Point]
    resumed: list[Point]
    """The steps after the middle, done again from the state there."""
    equal: bool
    """Whether parameters and the method's state were then the same bit for bit."""
    ranks: int
    """Ranks of all targets that are left."""


def run_steps(world: World, built: Built, setup: Setup, steps: range) -> list[Point]:
    """Loss over all ranks and gradient norm of each step."""
    if setup.engine == "single":
        world = replace(world, rank=0, size=1)
    each = setup.micros // world.size
    first = world.rank * each
    assert isinstance(built.method, TakesPartInSteps)
    guard = Guard(GuardConfig(), world, scales_loss=False, state=GuardState())
    points = []
    for step in steps:
        batches = [make_batch(step, first + m, packed=False) for m in range(each)]
        stats = train_step(
            step + 1,
            batches,
            engine=built.engine,
            objective=Causal(),
            world=world,
            max_norm=setup.max_norm,
            guard=guard,
            participant=built.method,
            total_steps=setup.steps,
        )
        points.append((float(stats.verdict.loss), float(stats.grad_norm)))
    return points


def keeper(world: World, built: Built) -> WithMethod:
    """What a checkpoint is taken of."""
    assert isinstance(built.method, TakesPartInSteps)
    return WithMethod(built.engine, built.method, world)


def train_and_resume(world: World, *, setup: Setup, at: int) -> Seen:
    """Train through, and again from the state at a step in a new engine."""
    built = build(world, setup)
    curve = run_steps(world, built, setup, range(at))
    state = keeper(world, built).state()
    source, scalars = StateSource(state.shards), dict(state.scalars)
    curve += run_steps(world, built, setup, range(at, setup.steps))
    again = build(world, setup)
    keeper(world, again).load_state(source, scalars)
    resumed = run_steps(world, again, setup, range(at, setup.steps))
    shards = [keeper(world, one).state().shards for one in (built, again)]
    pairs = list(zip(*shards, strict=True))
    equal = all(one.name == two.name and torch.equal(one.local, two.local) for one, two in pairs)
    left = sum(int(s.local.sum()) for s in shards[0] if s.name.startswith("method/kept/"))
    return Seen(curve, resumed, equal, left)


def train_and_save(world: World, *, setup: Setup, folder: Path) -> dict[str, object]:
    """Train to the end and export; what the exported files say, and the logits of one batch."""
    built = build(world, setup)
    run_steps(world, built, setup, range(setup.steps))
    built.method.save(built.engine.full_tensors(), str(folder))
    ids = make_batch(77, 0, packed=False).input_ids
    with torch.no_grad():
        logits = built.engine.module.eval()(ids).logits
    config = json.loads((folder / "adapter_config.json").read_text())
    back = build(world, setup, saved=folder)
    with torch.no_grad():
        again = back.engine.module.eval()(ids).logits
    return {"logits": logits, "ids": ids, "pattern": config["rank_pattern"], "again": again}
