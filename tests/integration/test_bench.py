"""``dtune bench``: a row for every case, each from processes of its own, and none without work."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtune.bench.record import Status, read_jsonl
from tests.integration.bench_runs import (
    QUICK,
    SMALL,
    assert_as_planned,
    assert_measured,
    bench,
    results_of,
)


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
        numbers = assert_measured(one, on_gpu=False)
        assert_as_planned(numbers)
        assert numbers.ceiling_flops is not None
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
    numbers = assert_measured(one, on_gpu=False)
    assert numbers.devices == 2
    assert numbers.tokens_per_step == 2 * 32
    assert one.settings["ranks"] == 2
