"""scancel of a run whose save takes long: done where KillWait allows it, else nothing is lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from dtune.cli import main
from dtune.runtime.status import State, read_status
from tests.faults.injection import newest_step, state_digest
from tests.slurm.cluster import Cluster
from tests.slurm.training import (
    EVERY,
    HOLD_AT,
    STEPS,
    environment,
    overrides,
    steps_of,
    submit_script,
    wait_for_step,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Seconds that the save takes longer; the cluster kills 5 s after it asked.
SLOW = {"in-time": 2.0, "too-slow": 20.0}


@dataclass(frozen=True)
class Cancelled:
    """A job that was cancelled."""

    run_dir: Path
    state: str
    restarts: int


@pytest.fixture(scope="module")
def cancelled(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cancelled]:
    """Side by side, since most of a short run is starting Python."""
    folder = tmp_path_factory.mktemp("cancelled")
    jobs = {
        name: submit_script(
            cluster,
            folder / name,
            options=("--nodes=1",),
            env=environment(hold_at=HOLD_AT, slow_save=seconds),
        )
        for name, seconds in SLOW.items()
    }
    for name, job in jobs.items():
        wait_for_step(cluster, job, folder / name, HOLD_AT - 1)
        cluster.wait_until(
            lambda run_dir=folder / name: newest_step(run_dir) == last_saved(HOLD_AT - 1),
            "the save before is whole",
            job=job,
        )
    cluster.client("scancel", *jobs.values())
    for job in jobs.values():
        cluster.wait_for(job, "CANCELLED")
        cluster.wait_until(lambda job=job: not is_completing(cluster, job), "it is gone", job=job)
    return {
        name: Cancelled(folder / name, cluster.state(job), cluster.restarts(job))
        for name, job in jobs.items()
    }


def is_completing(cluster: Cluster, job: str) -> bool:
    """Whether some of its processes are still there."""
    return cluster.client("squeue", "-h", "-j", job, "-o", "%t", check=False) != ""


def last_saved(step: int) -> int:
    return step - step % EVERY


def test_scancel_leaves_time_for_a_save_shorter_than_killwait(
    cancelled: dict[str, Cancelled],
) -> None:
    it = cancelled["in-time"]
    assert (it.state, it.restarts) == ("CANCELLED", 0)
    assert read_status(it.run_dir).state is State.preempted
    assert newest_step(it.run_dir) == HOLD_AT
    assert state_digest(it.run_dir)


def test_a_save_that_scancel_kills_leaves_the_one_before_to_go_on_from(
    cancelled: dict[str, Cancelled],
) -> None:
    it = cancelled["too-slow"]
    assert (it.state, it.restarts) == ("CANCELLED", 0)
    assert read_status(it.run_dir).state is State.running
    assert newest_step(it.run_dir) == last_saved(HOLD_AT - 1)
    assert state_digest(it.run_dir)
    assert main(["train", *overrides(it.run_dir), "resume=auto"]) == 0
    assert steps_of(it.run_dir, "resume") == [last_saved(HOLD_AT - 1)]
    assert steps_of(it.run_dir, "train") == list(range(1, STEPS + 1))
    assert newest_step(it.run_dir) == STEPS
