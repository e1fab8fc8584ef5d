"""Runs that one engine and world stops and another goes on with, by every rank of a pool.

``write`` is a whole run that is saved in its middle and goes on to its end; ``read`` goes on from
such checkpoints of other engines and worlds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from dtune.assemble import assemble
from dtune.checkpoint.layout import step_name
from dtune.checkpoint.reader import CHECKPOINTS
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.resources import resolve_path
from dtune.run_folder import start_run_folder
from dtune.runtime.seed import seed_everything
from dtune.runtime.world import World
from dtune.train.sinks.base import Row
from dtune.train.trainer import Trainer
from dtune.types import Batch

ROWS = 64
GLOBAL_BATCH = 12
# Divides the global batch; with 1 and 2 processes a step has two micro batches, with more one.
MICRO_BATCH = {1: 6, 2: 3, 3: 4, 4: 3}
METHODS = ("lora", "full")
# Packed and padded rows are both moved.
PACKING = {"lora": "true", "full": "false"}

Step = list[tuple[int, ...]]
"""The rows of each sequence of an optimizer step, in the order of the data."""


@dataclass(frozen=True)
class Lengths:
    """Optimizer steps before the checkpoint, and in all."""

    saved: int
    total: int


@dataclass(frozen=True)
class Seen:
    """What one rank saw of a run, or of a part of it."""

    losses: dict[int, float]
    """Of all ranks, by optimizer step."""
    micros: dict[int, list[tuple[tuple[int, ...], ...]]]
    """The rows of each micro batch of this rank, by optimizer step."""
    sequences_per_epoch: int
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Elements of each tensor of the state that this rank holds."""
    unequal: tuple[str, ...] = ()
    """Tensors of the state that differ in a bit from the files of the checkpoint."""


def small_model(folder: Path) -> Path:
    """An architecture of two small blocks, with the tokenizer of the embedded model."""
    shutil.copytree(resolve_path("dtune://tiny"), folder)
    (folder / "model.safetensors").unlink()
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update(hidden_size=48, intermediate_size=80, num_hidden_layers=2, head_dim=12)
    path.write_text(json.dumps({**config, "dtype": "float32"}), encoding="utf-8")
    return folder


@cache
def _composed(model: Path, engine: str, peft: str, more: tuple[str, ...]) -> str:
    return compose_overrides(
        "train",
        [
            "run_dir=later",
            f"model.path={model}",
            "model.init=random",
            f"parallel={engine}",
            *(["parallel.param_persistence_threshold=0"] if engine == "zero3" else []),
            f"peft={peft}",
            "precision=fp32",
            "optim.lr=1e-3",
            "optim.weight_decay=0.1",
            f"train.global_batch_size={GLOBAL_BATCH}",
            "data.eval_path=none",
            f"data.max_rows={ROWS}",
            "data.max_length=96",
            f"data.packing={PACKING[peft]}",
            "evaluate.generate=false",
            "evaluate.before=false",
            "checkpoint.keep=9",
            "log.progress=lines",
            *more,
        ],
    )


def frozen(
    model: Path,
    run_dir: Path,
    *more: str,
    engine: str,
    world: int,
    peft: str,
    lengths: Lengths,
    resume: Path | None = None,
) -> str:
    """The frozen config of a run that is saved once before its end."""
    config = yaml.safe_load(_composed(model, engine, peft, more))
    config["run_dir"] = str(run_dir)
    config["resume"] = "false" if resume is None else str(resume)
    config["train"]["max_steps"] = lengths.total
    config["train"]["micro_batch_size"] = MICRO_BATCH[world]
    config["checkpoint"]["every"] = lengths.saved
    return yaml.safe_dump(config)


@dataclass
class _Record:
    """A sink that keeps losses, and what was fed to the trainer."""

    losses: dict[int, float] = field(default_factory=dict)
    micros: dict[int, list[tuple[tuple[int, ...], ...]]] = field(default_factory=dict)

    def write(self, row: Row) -> None:
        if row["kind"] == "train":
            self.losses[int(row["step"])] = float(row["loss"])

    def close(self) -> None:
        """Nothing is held."""

    def attach(self, trainer: Trainer) -> None:
        """Keep what the trainer is fed and what it says."""
        advance: Any = trainer.advance

        def recording(step: int, batches: Sequence[Batch]) -> None:
            self.micros[step] = [batch.rows for batch in batches]
            advance(step, batches)

        trainer.advance = recording  # type: ignore[method-assign]
        trainer.sinks = [*trainer.sinks, self]


@contextmanager
def assembled(world: World, text: str) -> Iterator[Trainer]:
    """A run as the worker builds it."""
    run = load_frozen(text)
    if world.is_first:
        start_run_folder(run, text, command=["dtune", "train"])
    world.barrier()
    seed_everything(run.seed, world.rank)
    trainer, _ = assemble(run, world)
    try:
        yield trainer
    finally:
        trainer.checkpointer.close()


def write(world: World, *, text: str, saved: int) -> Seen:
    """A run from its first step to its last, saved in between."""
    with assembled(world, text) as trainer:
        record = _Record()
        record.attach(trainer)
        held: list[tuple[str, int, torch.Tensor]] = []

        class Keep:
            """Keeps the state as it is when it is saved."""

            def write(self, row: Row) -> None:
                if row["kind"] == "train" and row["step"] == saved:
                    shards = trainer.engine.state().shards
                    held.extend((s.name, s.start, s.local.detach().clone()) for s in shards)

            def close(self) -> None:
                """Nothing is held."""

        trainer.sinks = [*trainer.sinks, Keep()]
        trainer.fit(evaluate_before=False)
        folder = trainer.run_dir / CHECKPOINTS / step_name(saved)
        ranges, unequal = compare(held, folder)
        epoch = trainer.loader.sequences_per_epoch
    return Seen(record.losses, record.micros, epoch, ranges, unequal)


def read(world: World, *, text: str, folder: Path) -> Seen:
    """A run that goes on from the checkpoint in a folder, to its end."""
    with assembled(world, text) as trainer:
        record = _Record()
        record.attach(trainer)
        shards = trainer.engine.state().shards
        ranges, unequal = compare([(s.name, s.start, s.local) for s in shards], folder)
        epoch = trainer.loader.sequences_per_epoch
        trainer.fit(evaluate_before=False)
    return Seen(record.losses, record.micros, epoch, ranges, unequal)


def compare(
    held: Sequence[tuple[str, int, torch.Tensor]], folder: Path
) -> tuple[dict[str, tuple[int, int]], tuple[str, ...]]:
    """The ranges that a rank holds, and which of them are not what the files hold."""
    whole = whole_tensors(folder)
    ranges = {name: (start, start + local.numel()) for name, start, local in held}
    unequal = sorted(
        name
        for name, start, local in held
        if not torch.equal(whole[name][start : start + local.numel()], local)
    )
    return ranges, tuple(unequal)


def whole_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The flat tensors of a checkpoint, from its files alone: no code that loads it has a part."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for path in sorted(folder.glob("rank-*.safetensors")):
        for key, values in load_file(path).items():
            name, _, start = key.rpartition("@")
            pieces.setdefault(name, {})[int(start)] = values
    return {
        name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in pieces.items()
    }


def in_order(seen: Sequence[Seen]) -> dict[int, Step]:
    """The sequences of each step over all ranks, in the order of the data."""
    steps: dict[int, Step] = {}
    for step, micros in seen[0].micros.items():
        steps[step] = [
            rows
            for micro in range(len(micros))
            for rank in seen
            for rows in rank.micros[step][micro]
        ]
    return steps
