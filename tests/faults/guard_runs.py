"""Runs in which a loss, a gradient or a weight goes bad at one step on one rank."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtune.errors import DivergedError
from dtune.runtime.world import World
from dtune.types import Batch, EngineState, LossParts, Objective
from tests.integration.train_runs import Assembled, assembled, untimed


class _SpoiledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] * ctx.factor, None


@dataclass
class Faulty:
    """An objective whose loss or gradient is bad at some steps, counted from 1."""

    inner: Objective
    it: Assembled
    kind: str
    steps: tuple[int, ...]

    def loss(self, model: nn.Module, batch: Batch) -> LossParts:
        parts = self.inner.loss(model, batch)
        if self.it.trainer.progress.step + 1 not in self.steps:
            return parts
        if self.kind == "gradient":
            return replace(parts, total=_SpoiledGradient.apply(parts.total, math.nan))
        factor = {"loss": math.nan, "spike": 100.0}[self.kind]
        return replace(parts, total=parts.total * factor)


def inject(it: Assembled, kind: str, steps: tuple[int, ...]) -> None:
    """Make this rank's numbers bad at some steps."""
    if kind == "weight":
        _spoil_weight_once(it, steps[0])
    elif kind:
        faulty: Any = Faulty(it.trainer.objective, it, kind, steps)
        it.trainer.objective = faulty


def _spoil_weight_once(it: Assembled, step: int) -> None:
    """As a device that fails would; it does not come again."""
    trained = [p for p in it.trainer.engine.module.parameters() if p.requires_grad]
    due = [True]

    def spoil(module: nn.Module, args: tuple[object, ...]) -> None:
        if due[0] and it.trainer.progress.step + 1 == step:
            due[0] = False
            trained[0].data.view(-1)[0] = math.nan

    it.trainer.engine.module.register_forward_pre_hook(spoil)


def digest(state: EngineState) -> str:
    """Of what this rank holds of parameters and optimizer state."""
    total = hashlib.sha256()
    for shard in state.shards:
        total.update(f"{shard.name} {shard.start} ".encode())
        total.update(shard.local.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def train(
    world: World | None,
    *,
    overrides: list[str],
    kind: str = "",
    steps: tuple[int, ...] = (),
    rank: int = 0,
    left_out: tuple[int, ...] = (),
) -> dict[str, Any]:
    """A run with a fault on one rank; how it ended, as this rank knows it."""
    with assembled(overrides, world) as it:
        trainer = it.trainer
        trainer.progress.guard.left_out.extend(left_out)
        if trainer.world.rank == rank:
            inject(it, kind, steps)
        error = ""
        try:
            trainer.fit(evaluate_before=False)
        except DivergedError as raised:
            error = str(raised)
        rows = it.memory.rows
        return {
            "error": error,
            "digest": digest(trainer.engine.state()),
            "scalars": dict(trainer.engine.state().scalars),
            "guard": asdict(trainer.progress.guard),
            "train": untimed(rows, "train"),
            "events": [row for row in rows if row["kind"] == "guard"],
            "finite": all(torch.isfinite(s.local).all() for s in trainer.engine.state().shards),
        }


def train_many(
    world: World, *, folder: str, common: list[str], runs: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Several runs of one engine, by name."""
    ended = {}
    for name, run in runs.items():
        given = dict(run)
        overrides = [f"run_dir={Path(folder) / name}", *common, *given.pop("more", ())]
        ended[name] = train(world, overrides=overrides, **given)
    return ended
