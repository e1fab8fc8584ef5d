"""A run that is stopped and resumed is the run that was not: bit for bit, under every engine."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest

from dtune.resources import resolve_path
from dtune.train.sinks.base import Row
from dtune.train.sinks.jsonl import read_metrics
from tests.distributed.pool import Pool
from tests.integration.runs import exported

STEPS = 6
TRAIN = "tests.integration.runs:train"
# What a clock or the process decides, and what only a resumed run has.
TIMED = {"tokens_per_second", "targets_per_second", "peak_memory_gib"}


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "heldout.jsonl"
    with open(resolve_path("dtune://instructions/heldout.jsonl"), encoding="utf-8") as file:
        path.write_text("".join(islice(file, 12)), encoding="utf-8")
    return path


def settings(run_dir: Path, held_out: Path, *more: str) -> list[str]:
    return [
        f"run_dir={run_dir}",
        f"data.eval_path={held_out}",
        f"train.max_steps={STEPS}",
        "train.micro_batch_size=2",
        "train.global_batch_size=8",
        "train.eval_every=2",
        "data.max_length=64",
        "evaluate.generate=false",
        "evaluate.before=false",
        "optim.lr=3e-3",
        "checkpoint.every=4",
        *more,
    ]


def numbers(run_dir: Path) -> list[Row]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    kept = [row for row in rows if row["kind"] in ("train", "eval")]
    return [{key: value for key, value in row.items() if key not in TIMED} for row in kept]


CASES = [
    ("single", "peft=lora", "peft.dropout=0.1"),
    ("single", "peft=full", "precision=bf16"),
    ("single", "peft=lora", "optim=adamw8bit"),
    ("ddp", "peft=lora", "peft.dropout=0.1"),
    ("fsdp", "peft=lora", "peft.dropout=0.1"),
    ("fsdp", "peft=full", "optim=sgd"),
    ("zero1", "peft=lora", "peft.dropout=0.1"),
    ("zero2", "peft=full", "optim.weight_decay=0.1"),
    ("zero3", "peft=lora", "peft.dropout=0.1"),
    ("zero3", "peft=full", "data.packing=false"),
]


@pytest.mark.parametrize(("engine", "method", "extra"), CASES)
def test_stopped_and_resumed_equals_uninterrupted(
    engine: str,
    method: str,
    extra: str,
    one_rank: Pool,
    two_ranks: Pool,
    held_out: Path,
    tmp_path: Path,
) -> None:
    pool = one_rank if engine == "single" else two_ranks
    more = [f"parallel={engine}", method, extra]
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert set(pool.run(TRAIN, overrides=settings(whole, held_out, *more))) == {"done"}
    stopped = pool.run(TRAIN, overrides=settings(parted, held_out, *more), stop_at=3)
    assert set(stopped) == {"preempted"}
    resumed = pool.run(TRAIN, overrides=settings(parted, held_out, *more, "resume=auto"))
    assert set(resumed) == {"done"}
    assert [row["step"] for row in numbers(whole) if row["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert numbers(parted) == numbers(whole)
    assert exported(whole)
    assert exported(parted) == exported(whole)


def test_another_seed_is_another_run(one_rank: Pool, held_out: Path, tmp_path: Path) -> None:
    """The comparison above can fail: it tells runs apart that differ in dropout alone."""
    runs = [tmp_path / "one", tmp_path / "two"]
    for run_dir, rate in zip(runs, ("0.1", "0.11"), strict=True):
        one_rank.run(TRAIN, overrides=settings(run_dir, held_out, f"peft.dropout={rate}"))
    assert numbers(runs[0]) != numbers(runs[1])
    assert exported(runs[0]) != exported(runs[1])
