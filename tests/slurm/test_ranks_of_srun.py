"""Ranks that srun has started, without torchrun: a job that loses one, and srun by hand."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from dtune.runtime.status import State, read_status
from tests.slurm.cluster import Cluster
from tests.slurm.training import (
    HOLD_AT,
    TWO_RANKS,
    environment,
    overrides,
    steps_of,
    submit_dtune,
    wait_for_step,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

GONE_SECONDS = 10


def ranks_of(run_dir: Path, tasks: list[int]) -> dict[int, int]:
    """Process of each rank, among those of a job."""
    found = {}
    for pid in tasks:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if words[1:-1] == ["-m", "dtune_launch.srun", "dtune.worker", str(run_dir)]:
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
            found[int(dict(v.split("=", 1) for v in variables if v)["SLURM_PROCID"])] = pid
    return found


def test_a_rank_that_is_killed_ends_its_job_and_all_its_tasks_soon(
    cluster: Cluster, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    env = environment(hold_at=HOLD_AT)
    job = submit_dtune(cluster, run_dir, *TWO_RANKS, env=env, launcher="slurm_srun")
    wait_for_step(cluster, job, run_dir, HOLD_AT - 1)
    ranks = ranks_of(run_dir, cluster.tasks(job))
    assert set(ranks) == {0, 1}
    os.kill(ranks[1], signal.SIGKILL)
    killed = time.monotonic()
    cluster.wait_until(lambda: cluster.tasks(job) == [], "its tasks are gone", job=job)
    assert time.monotonic() - killed < GONE_SECONDS
    cluster.wait_for(job, "FAILED")
    assert cluster.restarts(job) == 0
    status = read_status(run_dir)
    assert (status.state, status.rank) == (State.failed, 1)


def test_srun_by_hand_trains_with_a_task_for_each_rank(cluster: Cluster, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = overrides(run_dir, "parallel=ddp", "train.max_steps=2")
    done = cluster.run(
        *("srun", "--nodes=2", "--ntasks=2", sys.executable, "-m", "dtune", "train", *settings),
        env={**os.environ, **environment()},
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_status(run_dir).state is State.done
    assert steps_of(run_dir, "train") == [1, 2]
    assert (run_dir / "logs" / "rank-1.log").is_file()
