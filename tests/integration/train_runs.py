"""Whole runs of the embedded model in this process, small enough to take a second."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dtune.assemble import assemble
from dtune.checkpoint.layout import list_steps
from dtune.checkpoint.reader import CHECKPOINTS
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.config.run import RunConfig
from dtune.errors import DivergedError
from dtune.evaluate.mode import AsksToStop
from dtune.resources import resolve_path
from dtune.run_folder import start_run_folder
from dtune.runtime.seed import seed_everything
from dtune.runtime.status import State
from dtune.runtime.world import World
from dtune.train.export import Exporter
from dtune.train.finish import Result, finish_run
from dtune.train.sinks.base import Row
from dtune.train.sinks.jsonl import read_metrics
from dtune.train.trainer import Trainer
from dtune.types import Engine

# What a clock or the process decides.
TIMED = {"tokens_per_second", "targets_per_second", "peak_memory_gib", "mfu"}


def settings(run_dir: Path, *more: str) -> list[str]:
    """Overrides of a short run; ``more`` comes last and wins."""
    return [
        f"run_dir={run_dir}",
        "train.max_steps=4",
        "train.micro_batch_size=2",
        "train.global_batch_size=4",
        "data.max_length=64",
        "data.max_rows=64",
        "data.eval_path=none",
        "evaluate.generate=false",
        "evaluate.before=false",
        "optim.lr=3e-3",
        "log.progress=lines",
        *more,
    ]


def held_out(folder: Path, rows: int = 12) -> str:
    """The setting that evaluates on the first held-out rows."""
    lines = Path(resolve_path("dtune://instructions/heldout.jsonl")).read_text("utf-8")
    path = folder / "heldout.jsonl"
    path.write_text("".join(lines.splitlines(keepends=True)[:rows]), encoding="utf-8")
    return f"data.eval_path={path}"


@dataclass
class Memory:
    """A sink that keeps the rows."""

    rows: list[Row] = field(default_factory=list)

    def write(self, row: Row) -> None:
        self.rows.append(row)

    def close(self) -> None:
        """Nothing is held."""


@dataclass
class Assembled:
    """A run that is ready to start."""

    run: RunConfig
    trainer: Trainer
    exporter: Exporter
    memory: Memory

    def finish(self) -> tuple[State, Result]:
        """Train and export."""
        state = self.trainer.fit(evaluate_before=self.run.evaluate.before)
        return state, finish_run(self.trainer, state, self.exporter, title="test")


@contextmanager
def assembled(overrides: list[str], world: World | None = None) -> Iterator[Assembled]:
    """Build a run as the worker does, with a sink more, which keeps the rows in memory.

    In a world of one that it starts and stops, or in the world given.
    """
    composes = world is None or world.is_first
    text = compose_overrides("train", overrides) if composes else ""
    mine = World.start() if world is None else world
    text = mine.broadcast(text)
    run = load_frozen(text)
    if mine.is_first:
        start_run_folder(run, text, command=["dtune", "train", *overrides])
    mine.barrier()
    try:
        seed_everything(run.seed, mine.rank)
        trainer, exporter = assemble(run, mine)
        memory = Memory()
        trainer.sinks = [*trainer.sinks, memory]
        yield Assembled(run, trainer, exporter, memory)
        trainer.checkpointer.close()
    finally:
        if world is None:
            mine.stop()


def poison(it: Assembled, step: int, value: float) -> None:
    """Spoil one trained weight before a step, as a device that fails would."""
    module = it.trainer.engine.module
    trained = [p for p in module.parameters() if p.requires_grad]
    forwards = iter(range(1_000_000))

    def spoil(module: nn.Module, args: tuple[object, ...]) -> None:
        if next(forwards) == (step - 1) * it.trainer.loader.accumulation:
            trained[0].data.view(-1)[0] = value

    module.register_forward_pre_hook(spoil)


def diverge(world: World, *, overrides: list[str], rank: int) -> str:
    """A run whose weight is spoiled on one rank of a pool before step 3; what is raised."""
    with assembled(overrides, world) as it:
        if world.rank == rank:
            poison(it, 3, math.nan)
        try:
            it.trainer.fit(evaluate_before=False)
        except DivergedError as error:
            return str(error)
    return ""


def overflow(it: Assembled, steps: range) -> None:
    """Make gradients infinite in some steps, as a loss scale that is too high does."""
    trainer = it.trainer
    trained = [p for p in trainer.engine.module.parameters() if p.requires_grad]
    passes = iter(range(1_000_000))

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        step = next(passes) // trainer.loader.accumulation + 1
        return grad * math.inf if step in steps else grad

    trained[0].register_hook(spoil)


def train(overrides: list[str]) -> list[Row]:
    """Run to the end; its rows of training without what a clock decides."""
    with assembled(overrides) as it:
        state, _ = it.finish()
        assert state is State.done
        return untimed(it.memory.rows, "train")


def untimed(rows: list[Row], kind: str) -> list[Row]:
    """Rows of a kind without what a clock decides."""
    return [
        {name: value for name, value in row.items() if name not in TIMED}
        for row in rows
        if row["kind"] == kind
    ]


def metrics(run_dir: Path, kind: str) -> list[Row]:
    """Rows of a kind in metrics.jsonl, without what a clock decides."""
    return untimed(read_metrics(run_dir / "metrics.jsonl"), kind)


def column(rows: list[Row], name: str) -> list[float]:
    """One number of every row."""
    return [float(row[name]) for row in rows]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


class Scripted:
    """An evaluator that says what the test wants, evaluation by evaluation."""

    def __init__(self, losses: Sequence[float]) -> None:
        self._losses = iter(losses)

    def __call__(self, engine: Engine, asks_to_stop: AsksToStop) -> dict[str, float]:
        return {"loss": next(self._losses)}


def kept(run_dir: Path) -> list[int]:
    """Steps that a run folder holds checkpoints of."""
    return list_steps(run_dir / CHECKPOINTS)


def pointer(run_dir: Path, name: str) -> int:
    """Step that LATEST or BEST names."""
    return int((run_dir / CHECKPOINTS / name).read_text().strip()[5:])
