"""``dtune bench``: a row for every case, each from processes of its own, and none without work."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dtune.bench.record import CaseResult, Status, read_jsonl

QUICK = ("bench.warm_up=1", "bench.steps=3", "bench.repeats=1")
SMALL = (
    *(*QUICK, "model=tiny", "train.micro_batch_size=1", "train.global_batch_size=2"),
    *("data.max_length=32", "optim.lr=1e-3", "bench.ceiling_seconds=0"),
)


def bench(*settings: str, memory: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command; ``memory``: address space that each of its processes may have."""

    def limit() -> None:
        if memory:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    return subprocess.run(
        [sys.executable, "-m", "dtune", "bench", *settings],
        capture_output=True,
        text=True,
        timeout=550,
        preexec_fn=limit,
    )


def results_of(folder: Path) -> dict[str, CaseResult]:
    return {one.case: one for one in read_jsonl(folder / "results.jsonl")}


@pytest.mark.slow
def test_methods_are_measured_side_by_side_and_scored_at_equal_tokens(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = bench(
        *("experiment=quickstart", "peft=lora,qlora", "schedule.warmup_steps=0"),
        *(*QUICK, "bench.ceiling_seconds=0.05", "bench.train_steps=4", "bench.rates={lora: 5e-3}"),
        *("evaluate.generate=false", f"bench.out={out}", "-m"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = results_of(out)
    assert list(results) == ["peft=lora", "peft=qlora"]
    for one in results.values():
        assert one.status is Status.ok
        assert one.measured is not None
        assert len(one.measured.step_seconds) == 3
        assert one.measured.ceiling_flops is not None
        # What dtune plan says, against the tensors of a step.
        assert one.measured.plan_error is not None
        assert abs(one.measured.plan_error) < 0.1
        assert one.measured.loss_last < one.measured.loss_first
        assert one.origin.versions["torch"]
        assert one.origin.command[:2] == ("dtune", "bench")
        assert one.score is not None
        assert one.score.steps == 4
        assert one.score.held_out["loss"] > 0
        assert [step for step, _ in one.score.losses] == [1, 2, 3, 4]
    assert len({one.score.tokens for one in results.values() if one.score}) == 1
    assert results["peft=qlora"].settings["quant.name"] == "nf4"
    # The method without a rate of its own has that of the config.
    for case, rate in enumerate(("0.005", "0.004")):
        for part in ("repeat-0", "train"):
            config = (out / "cases" / str(case) / part / "config.yaml").read_text()
            assert f"lr: {rate}" in config
    table = (out / "table.md").read_text()
    assert table.strip() in done.stdout
    assert table.count("\n| `peft=") == 2
    assert "held-out loss" in table
    assert (out / "loss.svg").is_file()
    assert (out / "memory.png").is_file()


@pytest.mark.slow
def test_cases_without_numbers_are_rows_and_the_others_go_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    # Rows that fit no memory; and a rate at which nothing is learned.
    done = bench(
        *(*SMALL, "optim.lr=1e-12", "bench.falls_within=5", "data.max_length=300000,32", "-m"),
        *("bench.plots=false", f"bench.out={out}"),
        memory=8 << 30,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    first, second = read_jsonl(out / "results.jsonl")
    assert (first.status, second.status) == (Status.oom, Status.refused)
    assert "memory" in first.reason
    assert "does not fall" in second.reason
    assert first.origin.hardware == second.origin.hardware
    table = (out / "table.md").read_text()
    assert "**oom**" in table
    assert "**refused**" in table


@pytest.mark.slow
def test_two_ranks_are_measured_as_one_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = bench(*SMALL, "parallel=fsdp", "launch.nproc=2", "bench.plots=false", f"bench.out={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    (one,) = results_of(out).values()
    assert one.measured is not None
    assert one.measured.devices == 2
    assert one.measured.tokens_per_step == 2 * 32
    assert one.settings["ranks"] == 2
