"""Workers that are killed, raise, exit, abort and crash, and a whole tree: nothing is lost."""

from __future__ import annotations

import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dtune.runtime.status import State, read_status
from tests.distributed.pool import Pool
from tests.faults.injection import (
    KINDS,
    Fault,
    exported,
    fired,
    kill_run,
    leftovers,
    newest_step,
    nothing_left,
    numbers,
    plan_faults,
    processes_of,
    start_train,
    state_digest,
)
from tests.integration.train_runs import settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

STEPS, EVERY = 40, 2
# kill -9 five times: four times of a rank, and of the whole tree as the fault of this number.
WAYS = (*KINDS, *("kill",) * 3)
TREE = 4
SEED = 20261121
LIMIT = 700


def overrides(run_dir: Path, *more: str) -> list[str]:
    return settings(
        run_dir,
        f"train.max_steps={STEPS}",
        f"checkpoint.every={EVERY}",
        "peft.dropout=0.1",
        "parallel=ddp",
        "launch.nproc=2",
        *more,
    )


def seeded_faults() -> list[Fault]:
    """Each way, on either rank, some steps into the attempt; the kills at random times."""
    chance = random.Random(SEED)
    kinds = chance.sample(WAYS, len(WAYS))
    kinds.insert(TREE, "tree")
    return [
        Fault(
            kind,
            rank=chance.randrange(2),
            after=chance.randint(EVERY + 1, 2 * EVERY + 1),
            delay=chance.uniform(0.001, 0.1) if kind in ("kill", "tree") else 0.0,
        )
        for number, kind in enumerate(kinds)
    ]


@dataclass(frozen=True)
class Survived:
    """A run that went through all of it, and one that did not."""

    run_dir: Path
    whole: Path
    said: str
    fired: list[dict[str, Any]]
    killed_at: int
    """Newest checkpoint when the whole tree was killed."""


@pytest.fixture(scope="module")
def survived(tmp_path_factory: pytest.TempPathFactory, two_ranks: Pool) -> Survived:
    folder = tmp_path_factory.mktemp("kills")
    run_dir, whole, log = folder / "run", folder / "whole", folder / "said.log"
    env = plan_faults(folder / "faults", seeded_faults())
    # After the whole tree was killed the same command goes on.
    command = overrides(run_dir, f"launch.max_restarts={len(WAYS)}", "resume=auto")
    with nothing_left(run_dir):
        first = start_train(command, log, env)
        deadline = time.monotonic() + LIMIT
        while not (folder / "faults" / f"fired-{TREE}.json").exists():
            assert first.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.005)
        assert kill_run(run_dir) >= 4
        first.wait()
        killed_at = newest_step(run_dir)
        second = start_train(command, log, env)
        # Beside it, since most of both is starting Python.
        pooled = overrides(whole)
        assert set(two_ranks.run("tests.integration.runs:train", overrides=pooled)) == {"done"}
        code = second.wait(timeout=LIMIT)
        assert code == 0, log.read_text()
        assert processes_of(run_dir) == {}
    return Survived(run_dir, whole, log.read_text(), fired(folder / "faults"), killed_at)


def test_every_fault_happened_and_took_one_attempt(survived: Survived) -> None:
    assert [(it["kind"], it["rank"]) for it in survived.fired] == [
        (fault.kind, fault.rank) for fault in seeded_faults()
    ]
    assert 0 < survived.killed_at < STEPS
    # The launcher that was started again counts its attempts anew.
    attempts = [it["attempt"] for it in survived.fired]
    assert attempts == [*range(TREE + 1), *range(len(WAYS) - TREE)]
    status = read_status(survived.run_dir)
    assert (status.state, status.step, status.message) == (State.done, STEPS, "")


def test_all_state_is_that_of_the_run_that_was_left_alone(survived: Survived) -> None:
    assert state_digest(survived.run_dir) == state_digest(survived.whole)
    assert exported(survived.run_dir) == exported(survived.whole)


def test_each_step_is_in_the_metrics_once(survived: Survived) -> None:
    rows = numbers(survived.run_dir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows == numbers(survived.whole)


def test_nothing_temporary_is_left(survived: Survived) -> None:
    assert leftovers(survived.run_dir) == []


def test_each_failure_is_shown_with_its_rank_and_the_traceback_of_what_was_raised(
    survived: Survived,
) -> None:
    ways = {
        "kill": "was killed by SIGKILL",
        "raise": "exited with 1",
        "exit": "exited with 1",
        "abort": "was killed by SIGABRT",
        "segfault": "was killed by SIGSEGV",
    }
    shown = re.findall(r"attempt ended: rank \d of this machine (.*)", survived.said)
    assert shown == [ways[it["kind"]] for it in survived.fired if it["kind"] != "tree"]
    raised = next(it for it in survived.fired if it["kind"] == "raise")
    told = survived.said.split(
        f"starting again: rank {raised['rank']} failed at step {raised['step'] - 1}: "
        "a fault injected by a test\n"
    )[1]
    assert told.startswith("Traceback (most recent call last):\n")
    assert "injected_faults.py" in told[:3000]
