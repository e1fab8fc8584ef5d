"""What ranks do with the rows of new tokens; run by ``test_added_tokens``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dtune.build import build_trained_model, prepare_engine, weights_of
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.objectives.causal import causal_loss
from dtune.parallel.deepspeed import DeepSpeedEngine
from dtune.runtime.world import World
from dtune.types import IGNORE_INDEX, Batch
from tests.distributed.training import make_batch

MICROS = 2


def _batches(step: int, first_id: int) -> Iterator[Batch]:
    """Micro batches in which every fifth id is one of three new tokens."""
    for micro in range(MICROS):
        batch = make_batch(step, micro, packed=True)
        ids = torch.where(batch.input_ids % 5 == 0, first_id + step % 3, batch.input_ids)
        trained = batch.labels != IGNORE_INDEX
        yield replace(batch, input_ids=ids, labels=torch.where(trained, ids, IGNORE_INDEX))


def curve(
    world: World, *, overrides: list[str], first_id: int, steps: int
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    """Loss and gradient norm of each step over all ranks, and the trained rows at the end.

    ZeRO-3 keeps no small parameter whole, as it would by default.
    """
    whole = DeepSpeedEngine._settings

    def settings(self: DeepSpeedEngine, model: nn.Module) -> dict[str, Any]:
        found = whole(self, model)
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepSpeedEngine, "_settings", settings)
        return _curve(world, overrides, first_id, steps)


def _curve(
    world: World, overrides: list[str], first_id: int, steps: int
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    run = load_frozen(compose_overrides("train", overrides))
    alone = run.parallel.name == "single"
    if alone:
        world = replace(world, rank=0, size=1)
    built = build_trained_model(run, load=True, device=world.device)
    weights = weights_of(built, seed=run.seed, start=None)
    engine = run.parallel.build(world, run.precision.name)
    prepare_engine(engine, built, run, weights, 30)
    engine.model.train()
    each = MICROS // world.size
    points = []
    for step in range(steps):
        batches = list(_batches(step, first_id))
        weight = sum(batch.num_targets for batch in batches)
        total = torch.zeros((), device=world.device)
        mine = batches[world.rank * each : (world.rank + 1) * each]
        for number, batch in enumerate(mine):
            with engine.micro(last=number == each - 1):
                loss = causal_loss(engine.model, batch).total / weight
                total += loss.detach()
                engine.backward(loss * engine.grad_scale)
        norm = engine.clip(1.0)
        engine.step()
        points.append(((total if alone else world.sum(total)).item(), norm.item()))
    rows = {n: t for n, t in engine.full_tensors() if t is not None and n.endswith(".rows")}
    return points, rows
