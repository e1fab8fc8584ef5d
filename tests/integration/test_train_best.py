"""Which checkpoint is the best, what is kept, and when a run stops by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from dtune.checkpoint.reader import CHECKPOINTS, CheckpointSource, open_checkpoint
from dtune.runtime.status import State
from dtune.train.finish import Result
from tests.integration.train_runs import (
    Scripted,
    assembled,
    held_out,
    kept,
    metrics,
    pointer,
    settings,
)


def run(
    tmp_path: Path, losses: Sequence[float], *more: str, name: str = "run"
) -> tuple[Path, Result]:
    """A run of 8 steps that is evaluated after each."""
    overrides = settings(
        tmp_path / name,
        held_out(tmp_path, rows=2),
        "train.max_steps=8",
        "train.eval_every=1",
        "checkpoint.every=1",
        "schedule=constant",
        *more,
    )
    with assembled(overrides) as it:
        it.trainer.evaluator = Scripted(losses)
        state, result = it.finish()
        assert state is State.done
    return tmp_path / name, result


def adapter(run_dir: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(run_dir / name / "adapter_model.safetensors")


def test_the_best_is_kept_named_and_exported_beside_the_last(tmp_path: Path) -> None:
    run_dir, result = run(tmp_path, [9, 8, 3, 4, 5, 6, 7, 8], "checkpoint.keep=1")
    assert kept(run_dir) == [3, 8]
    assert (pointer(run_dir, "BEST"), pointer(run_dir, "LATEST")) == (3, 8)
    assert (result.best_step, result.best_export) == (3, str(run_dir / "best-adapter"))
    best, last = adapter(run_dir, "best-adapter"), adapter(run_dir, "adapter")
    assert best.keys() == last.keys()
    assert not any(torch.equal(best[name], last[name]) for name in best)
    # Each is what was saved at its step; the names differ, the values can be told apart.
    for step, exported in ((3, best), (8, last)):
        info = open_checkpoint(run_dir / CHECKPOINTS / f"step-{step:08d}")
        source = CheckpointSource(info)
        saved = {
            name: source.read(name, 0, math.prod(source.shape(name)))
            for name in source.names()
            if name.startswith("param/")
        }
        values = sorted(tensor.tolist() for tensor in saved.values())
        assert values == sorted(tensor.flatten().tolist() for tensor in exported.values())


def test_a_best_that_is_the_last_is_exported_once(tmp_path: Path) -> None:
    run_dir, result = run(tmp_path, [9, 8, 7, 6, 5, 4, 3, 2], "checkpoint.keep=2")
    assert kept(run_dir) == [7, 8]
    assert (pointer(run_dir, "BEST"), pointer(run_dir, "LATEST")) == (8, 8)
    assert result.best_export == ""
    assert not (run_dir / "best-adapter").exists()


def test_a_run_stops_after_as_many_evaluations_without_gain_as_asked(tmp_path: Path) -> None:
    losses = [9, 8, 8, 8.5, 8, 7, 6, 5]
    run_dir, result = run(tmp_path, losses, "train.early_stopping=3")
    assert (result.steps, result.total_steps, result.best_step) == (5, 8, 2)
    assert kept(run_dir) == [2, 4, 5]
    assert (run_dir / "best-adapter").is_dir()
    # With more patience the same run reaches the gain that comes later.
    _, patient = run(tmp_path, losses, "train.early_stopping=4", name="patient")
    assert (patient.steps, patient.best_step) == (8, 8)


def test_a_run_that_stopped_early_stays_so_when_resumed(tmp_path: Path) -> None:
    losses = [9, 8, 8, 8, 8, 7, 6, 5]
    run_dir, _ = run(tmp_path, losses, "train.early_stopping=3")
    before = adapter(run_dir, "adapter")
    _, again = run(tmp_path, [1] * 8, "train.early_stopping=3", "resume=auto")
    assert again.steps == 5
    after = adapter(run_dir, "adapter")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [row["step"] for row in metrics(run_dir, "train")] == [1, 2, 3, 4, 5]
    # It goes on where it may wait for longer.
    _, longer = run(tmp_path, [7] * 8, "train.early_stopping=5", "resume=auto")
    assert (longer.steps, longer.best_step) == (8, 6)


def test_what_was_best_survives_a_resume(tmp_path: Path) -> None:
    """A worse evaluation after the resume is not taken for the first."""
    overrides = settings(
        tmp_path / "run",
        held_out(tmp_path, rows=2),
        "train.max_steps=6",
        "train.eval_every=1",
        "checkpoint.every=1",
        "checkpoint.keep=1",
    )
    with assembled(overrides) as it:
        it.trainer.evaluator = Scripted([5, 3, 4, 4, 4, 4])
        stop = it.trainer.stop

        class StopAfterThree:
            def write(self, row: dict[str, str | int | float]) -> None:
                if (row["kind"], row["step"]) == ("train", 3):
                    stop.signal_name = "SIGUSR1"

            def close(self) -> None:
                """Nothing is held."""

        it.trainer.sinks = [*it.trainer.sinks, StopAfterThree()]
        state, stopped = it.finish()
    assert (state, stopped.steps, stopped.export) == (State.preempted, 3, "")
    assert kept(tmp_path / "run") == [2, 3]
    with assembled([*overrides, "resume=auto"]) as it:
        it.trainer.evaluator = Scripted([4, 4, 4, 4])
        _, result = it.finish()
    assert (result.steps, result.best_step) == (6, 2)
    assert kept(tmp_path / "run") == [2, 6]
