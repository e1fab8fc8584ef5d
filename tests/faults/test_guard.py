"""A bad step is never taken: all ranks decide alike, before the optimizer."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.errors import ConfigError
from dtune.runtime.world import World
from dtune.train.guard import GOOD, NONFINITE, SPIKE, Guard, GuardState
from dtune.train.guard_schema import GuardConfig, Policy, SpikePolicy
from dtune.train.sinks.jsonl import read_metrics
from tests.distributed.pool import Pool
from tests.faults.guard_runs import train
from tests.integration.train_runs import settings

STEPS = 6
BAD = 4
COMMON = (f"train.max_steps={STEPS}", "checkpoint.every=2")
SPIKES = ("guard.spike_window=4", "guard.spike_sigma=8")

RUNS: dict[str, dict[str, Any]] = {
    # What all the others are to end as: the optimizer never had the bad step.
    "without": {"left_out": (BAD,)},
    "skip": {"kind": "loss", "more": ["guard=skip", "guard.spike=ignore"]},
    "rollback": {"kind": "gradient", "more": ["guard=rollback", "guard.spike=ignore"]},
    "spike": {"kind": "spike", "more": ["guard=skip", "log.every=3", *SPIKES]},
    "stop": {"kind": "gradient", "more": ["log.every=3"]},
}
RUNS = {
    name: run if name == "without" else {**run, "steps": (BAD,), "rank": 1}
    for name, run in RUNS.items()
}


def ended_on_two_ranks(pool: Pool, folder: Path, engine: str) -> list[dict[str, dict[str, Any]]]:
    common = [*settings(folder, *COMMON, f"parallel={engine}")[1:]]
    return pool.run(
        "tests.faults.guard_runs:train_many", folder=str(folder), common=common, runs=RUNS
    )


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp", "zero2", "zero3"])
def test_two_ranks_decide_alike_and_never_take_a_bad_step(
    tmp_path: Path, two_ranks: Pool, engine: str
) -> None:
    ranks = ended_on_two_ranks(two_ranks, tmp_path, engine)
    for name in RUNS:
        first, second = (rank[name] for rank in ranks)
        assert first["events"], name
        # As text, where NaN is NaN.
        assert repr(first["events"]) == repr(second["events"]), name
        assert first["guard"] == second["guard"]
        assert first["finite"], name
        assert second["finite"], name
    for rank in ranks:
        clean = rank["without"]["digest"]
        for name in ("skip", "rollback", "spike"):
            assert rank[name]["error"] == "", name
            assert rank[name]["digest"] == clean, name
            assert rank[name]["scalars"] == rank["without"]["scalars"], name
        # The comparison can fail: a run that stopped has other state.
        assert rank["stop"]["digest"] != clean
        assert f"at step {BAD}" in rank["stop"]["error"]
    told = {name: run["events"][0] for name, run in ranks[0].items()}
    assert {name: event["action"] for name, event in told.items()} == {
        "without": "left out",
        "skip": "skip",
        "rollback": "rollback",
        "spike": "skip",
        "stop": "stop",
    }
    assert told["spike"]["cause"] == "spike"
    assert told["rollback"]["step"] == 2, "the checkpoint that it went back to"
    for name, prefix in (("skip", "guard"), ("rollback", "guard"), ("stop", "diverged")):
        report = json.loads((tmp_path / name / f"{prefix}-step-{BAD}.json").read_text())
        assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
        assert all(rank["rows"][0]["text"] for rank in report["ranks"])
    rows = read_metrics(tmp_path / "rollback" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3, 5, 6]


def ended(folder: Path, *more: str, **fault: Any) -> dict[str, Any]:
    return train(None, overrides=settings(folder, *COMMON, *more), **fault)


def test_a_spoiled_weight_is_repaired_by_a_rollback_alone(tmp_path: Path) -> None:
    fault = {"kind": "weight", "steps": (BAD,)}
    clean = ended(tmp_path / "clean", left_out=(BAD,))
    back = ended(tmp_path / "back", "guard=rollback", "guard.spike=ignore", **fault)
    assert (back["error"], back["digest"]) == ("", clean["digest"])
    skipping = ended(
        tmp_path / "skip", "guard=skip", "guard.spike=ignore", "guard.max_skips_in_a_row=2", **fault
    )
    assert "at step 6 after 2 steps in a row" in skipping["error"]


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
@pytest.mark.parametrize("log_every", [1, 5])
def test_steps_after_one_that_stops_the_run_are_not_taken_either(
    tmp_path: Path, optim: str, log_every: int
) -> None:
    more = (f"optim={optim}", "checkpoint.every=0", "schedule=constant", f"log.every={log_every}")
    stopped = ended(tmp_path / "bad", *more, kind="loss", steps=(2,))
    assert "at step 2" in stopped["error"]
    assert [row["step"] for row in stopped["train"]] == [1]
    assert stopped["digest"] == ended(tmp_path / "one", *more, "train.max_steps=1")["digest"]
    assert stopped["digest"] != ended(tmp_path / "two", *more, "train.max_steps=2")["digest"]


def test_rollbacks_come_to_an_end(tmp_path: Path) -> None:
    more = ("guard=rollback", "guard.spike=ignore", "guard.max_rollbacks=2")
    it = ended(tmp_path, *more, kind="loss", steps=(3, 4, 5, 6))
    assert "loss nan at step 5 after 2 rollbacks" in it["error"]
    assert it["guard"]["left_out"] == [3, 4]


def test_a_rollback_may_leave_out_steps_before_the_bad_one(tmp_path: Path) -> None:
    more = ("guard=rollback", "guard.spike=ignore", "guard.leave_out=3")
    it = ended(tmp_path / "run", *more, kind="loss", steps=(4,))
    # Step 2 is in the checkpoint.
    assert it["guard"]["left_out"] == [3, 4]
    assert it["digest"] == ended(tmp_path / "clean", left_out=(3, 4))["digest"]


def test_a_run_that_is_stopped_goes_on_with_the_same_window_and_decides_the_same(
    tmp_path: Path,
) -> None:
    more = ("guard=skip", *SPIKES, "train.max_steps=8")
    fault = {"kind": "spike", "steps": (7,)}
    whole = ended(tmp_path / "whole", *more, **fault)
    ended(tmp_path / "two", *more, "train.max_steps=8", "train.early_stopping=0", **fault)
    # The newest checkpoint goes: the run goes on from step 6, one step before the spike.
    checkpoints = tmp_path / "two" / "checkpoints"
    (checkpoints / "step-00000008").rename(tmp_path / "aside")
    again = ended(tmp_path / "two", *more, "resume=auto", **fault)
    assert whole["events"] == again["events"] != []
    assert again["digest"] == whole["digest"]
    assert again["guard"] == whole["guard"]


@pytest.fixture
def guard(world: World) -> Guard:
    config = GuardConfig(
        nonfinite=Policy.skip, spike=SpikePolicy.skip, spike_sigma=3.0, spike_window=8
    )
    return Guard(config, world, scales_loss=False, state=GuardState())


def judge(guard: Guard, loss: float, norm: float = 1.0) -> tuple[int, bool]:
    verdict = guard.judge(torch.tensor(loss), torch.tensor(norm))
    return int(verdict.cause), bool(verdict.blocked)


def test_a_spike_is_measured_against_the_good_steps_before_it(guard: Guard) -> None:
    noise = itertools.cycle([1.9, 2.1, 2.0])
    # Too few to say what is usual.
    assert judge(guard, 50.0) == (GOOD, False)
    for _ in range(8):
        assert judge(guard, next(noise)) == (GOOD, False)
    for bad in (2.6, 50.0):
        assert judge(guard, bad) == (SPIKE, True)
    assert judge(guard, math.nan) == (NONFINITE, True)
    assert judge(guard, 2.0, math.inf) == (NONFINITE, True)
    # What was bad is not in the window: it would make later spikes look small.
    assert max(guard.window()[0]) < 2.2
    assert judge(guard, 2.1) == (GOOD, False)
    assert judge(guard, 0.1) == (GOOD, False), "a fall is no spike"


def test_a_guard_that_goes_on_decides_as_the_one_before(guard: Guard, world: World) -> None:
    for value in (2.0, 2.1, 1.9, 2.05, 1.95):
        judge(guard, value)
    losses, norms = guard.window()
    config = GuardConfig(spike=SpikePolicy.skip, spike_sigma=3.0, spike_window=8)
    state = GuardState(losses=losses, norms=norms)
    other = Guard(config, world, scales_loss=False, state=state)
    for value in (2.0, 2.2, 2.3, 1.7, 2.6):
        assert judge(other, value) == judge(guard, value)
    assert other.window() == guard.window()


@pytest.mark.parametrize(
    "setting", ["guard.spike_sigma=0", "guard.spike_window=3", "guard.max_skips=0"]
)
def test_settings_that_say_nothing_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=setting.split("=")[0]):
        load_frozen(compose_overrides("train", [setting]))
