"""``dtune bench``: a row for every case, each from processes of its own, and none without work."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dtune.bench.record import CaseResult, Status, read_jsonl

SMALL = (
    *("model=tiny", "train.micro_batch_size=1", "train.global_batch_size=2"),
    *("data.max_length=32", "optim.lr=1e-3"),
    *("bench.warm_up=1", "bench.steps=3", "bench.repeats=1", "bench.ceiling_seconds=0.05"),
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
def test_methods_are_measured_side_by_side(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    done = bench(*SMALL, "peft=lora,qlora,full", f"bench.out={out}", "-m")
    assert done.returncode == 0, done.stdout + done.stderr
    results = results_of(out)
    assert list(results) == ["peft=lora", "peft=qlora", "peft=full"]
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
    assert results["peft=qlora"].settings["quant.name"] == "nf4"
    table = (out / "table.md").read_text()
    assert table.strip() in done.stdout
    assert table.count("\n| `peft=") == 3
    assert (out / "loss.svg").is_file()
    assert (out / "memory.png").is_file()
    again = bench(*SMALL, f"bench.out={out}")
    assert again.returncode == 2
    assert "holds results already" in again.stderr


@pytest.mark.slow
def test_a_bad_case_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    # No layer is named so; and at such a rate nothing is learned.
    done = bench(
        *SMALL,
        "peft=lora",
        "peft.targets=[no_such_layer],[q_proj]",
        "optim.lr=1e-12,1e-3",
        "bench.falls_within=5",
        "bench.plots=false",
        f"bench.out={out}",
        "-m",
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = [(one.status, one.reason) for one in read_jsonl(out / "results.jsonl")]
    assert [status.value for status, _ in found] == ["failed", "refused", "failed", "ok"]
    assert "no_such_layer" in found[0][1]
    assert "does not fall" in found[1][1]
    assert "**refused**" in (out / "table.md").read_text()


def test_a_case_out_of_memory_is_a_row_and_the_others_go_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = bench(
        *SMALL,
        "data.max_length=300000,32",
        "bench.plots=false",
        f"bench.out={out}",
        "-m",
        memory=8 << 30,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_jsonl(out / "results.jsonl")
    assert [one.status for one in rows] == [Status.oom, Status.ok]
    assert "memory" in rows[0].reason
    assert "**oom**" in (out / "table.md").read_text()


@pytest.mark.slow
def test_two_ranks_are_measured_as_one_step(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = bench(
        *SMALL,
        *("parallel=ddp,fsdp", "launch.nproc=2", "bench.plots=false", f"bench.out={out}", "-m"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for one in results_of(out).values():
        assert one.measured is not None
        assert one.measured.devices == 2
        assert one.measured.tokens_per_step == 2 * 32
        assert one.settings["ranks"] == 2


@pytest.mark.slow
def test_methods_are_scored_on_held_out_rows_at_equal_tokens(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = bench(
        *("experiment=quickstart", "peft=lora,ia3", "schedule.warmup_steps=0"),
        *("bench.warm_up=1", "bench.steps=2", "bench.repeats=1", "bench.ceiling_seconds=0"),
        *("bench.train_steps=4", "bench.rates={lora: 4e-3}", "evaluate.generate=false"),
        *("bench.plots=false", f"bench.out={out}", "-m"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = results_of(out)
    scores = [one.score for one in results.values()]
    assert all(score is not None for score in scores)
    assert len({score.tokens for score in scores if score}) == 1
    for score in scores:
        assert score is not None
        assert score.steps == 4
        assert score.held_out["loss"] > 0
        assert [step for step, _ in score.losses] == [1, 2, 3, 4]
    assert "held-out loss" in (out / "table.md").read_text()
    trained = (out / "cases" / "0" / "train" / "config.yaml").read_text()
    assert "lr: 0.004" in trained
    # The method without a rate of its own is trained with that of the config.
    assert "lr: 0.004" in (out / "cases" / "1" / "train" / "config.yaml").read_text()


@pytest.mark.slow
def test_a_case_that_takes_too_long_is_killed_and_a_row(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = bench(
        *SMALL,
        "bench.steps=1000000",
        "bench.max_minutes=0.3",
        "bench.plots=false",
        f"bench.out={out}",
    )
    assert done.returncode == 1
    (one,) = read_jsonl(out / "results.jsonl")
    assert one.status is Status.failed
    assert one.reason == "killed after bench.max_minutes=0.3"
