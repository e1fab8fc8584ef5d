"""``dtune train launch=slurm``, and the commands on its job, with a real SLURM at the other end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dtune.commands.running import read_standing
from dtune.runtime.status import State, read_status
from tests.slurm.cluster import Cluster
from tests.slurm.training import (
    HOLD_AT,
    SHARED,
    TWO_NODES,
    TWO_RANKS,
    call_dtune,
    environment,
    overrides,
    steps_of,
    wait_for_step,
)
from tests.unit.test_launch_secrets import SECRETS, find_secrets, seen_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFIG_ERROR = 2
ANY_WORLD = ("launch=slurm_srun", "launch.nproc=1", "train.global_batch_size=36")
REFUSED = {
    "partition": "launch.partition=gpu",
    "gpus": "launch.gpus_per_node=9",
    "nodes": "launch.nodes=9",
    "time": "launch.time=2-00:00:00",
    "constraint": "launch.constraint=h100",
}
"""What is set; the answer has to name its key, whether dtune knew it first or SLURM told it."""


@dataclass(frozen=True)
class Cancelled:
    """A job that was submitted, watched and cancelled by dtune's commands."""

    job: str
    run_dir: Path
    submitted: str
    status: str
    """While it ran."""
    followed: str
    """What ``dtune logs -f`` has shown to its end."""
    cancelled: str
    rank: tuple[bytes, bytes]
    """Command line and environment of the first rank."""


@pytest.fixture(scope="module")
def cancelled(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cancelled:
    run_dir = tmp_path_factory.mktemp("submission") / "run"
    settings = overrides(run_dir, "launch=slurm", SHARED, "launch.time=0:30:00")
    env = {**environment(hold_at=HOLD_AT), **SECRETS}
    done = call_dtune(cluster, "train", *settings, env=env)
    assert done.returncode == 0, done.stderr
    job = json.loads((run_dir / "job.json").read_text())["job_id"]
    follower = subprocess.Popen(
        [sys.executable, "-m", "dtune", "logs", str(run_dir), "-f"],
        env={**os.environ, **cluster.env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for_step(cluster, job, run_dir, HOLD_AT - 1)
        rank = seen_of(read_standing(run_dir).holders[0].pid)
        status = call_dtune(cluster, "status", str(run_dir))
        cancel = call_dtune(cluster, "cancel", str(run_dir))
        assert (status.returncode, cancel.returncode) == (0, 0), status.stderr + cancel.stderr
        cluster.wait_for(job, "FAILED", "COMPLETED", "CANCELLED")
        followed = follower.communicate(timeout=120)[0]
    finally:
        follower.kill()
    return Cancelled(job, run_dir, done.stdout, status.stdout, followed, cancel.stdout, rank)


def test_a_submitted_run_says_its_job_and_where_its_logs_are(cancelled: Cancelled) -> None:
    it = cancelled
    assert f"job {it.job} " in it.submitted
    assert str(it.run_dir / "logs") in it.submitted
    assert (it.run_dir / "job.sbatch").read_text().startswith("#!/bin/bash\n")


def test_status_of_a_submitted_run_tells_job_nodes_and_step(cancelled: Cancelled) -> None:
    lines = dict(line.split(None, 1) for line in cancelled.status.splitlines())
    assert lines["state"] == f"running, step {HOLD_AT - 1}"
    assert lines["job"].startswith(f"{cancelled.job} RUNNING n")


def test_logs_of_a_submitted_run_are_followed_from_before_its_start_to_its_end(
    cancelled: Cancelled,
) -> None:
    assert "waiting for the run to start" in cancelled.followed
    assert "step 1/" in cancelled.followed
    assert f"stopping at step {HOLD_AT} as asked by SIGUSR1" in cancelled.followed


def test_cancel_saves_and_the_job_is_not_requeued(cluster: Cluster, cancelled: Cancelled) -> None:
    it = cancelled
    assert f"job {it.job} saves and stops" in it.cancelled
    assert (cluster.restarts(it.job), read_status(it.run_dir).state) == (0, State.preempted)
    assert read_status(it.run_dir).step == HOLD_AT == steps_of(it.run_dir, "train")[-1]
    (said,) = (path.read_text() for path in it.run_dir.glob("logs/*.out"))
    assert "cancelled, saving and stopping" in said
    again = call_dtune(cluster, "cancel", str(it.run_dir))
    assert again.returncode == CONFIG_ERROR
    assert "does not run: it is preempted" in again.stderr


def test_no_secret_is_in_what_a_job_writes_or_in_its_command_lines(cancelled: Cancelled) -> None:
    it = cancelled
    line, told = it.rank
    assert b"dtune.worker" in line
    # The ranks had them, so there was something to leak.
    assert [name for name, secret in SECRETS.items() if secret.encode() not in told] == []
    assert {"job.sbatch", "job.json"} <= {path.name for path in it.run_dir.iterdir()}
    assert find_secrets(it.run_dir.parent) == []
    shown = it.submitted + it.status + it.followed + it.cancelled + line.decode()
    assert [name for name, secret in SECRETS.items() if secret in shown] == []


@pytest.fixture(scope="module")
def refused(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, int, str]]:
    """Side by side, since most of each is starting Python: folder, exit code, what it said."""
    folder = tmp_path_factory.mktemp("refused")
    processes = {
        name: subprocess.Popen(
            [
                *(sys.executable, "-m", "dtune", "train"),
                *overrides(folder / name, *TWO_RANKS, *TWO_NODES, *ANY_WORLD, setting),
            ],
            env={**os.environ, **cluster.env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, setting in REFUSED.items()
    }
    said = {name: process.communicate(timeout=300)[0] for name, process in processes.items()}
    return {name: (folder / name, processes[name].returncode, said[name]) for name in REFUSED}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_slurm_does_not_take_is_refused_with_the_key_and_nothing_is_left(
    cluster: Cluster, refused: dict[str, tuple[Path, int, str]], name: str
) -> None:
    run_dir, code, said = refused[name]
    assert code == CONFIG_ERROR, said
    assert REFUSED[name].partition("=")[0] in said
    assert "shared disk" not in said
    assert "Traceback" not in said
    assert not (run_dir / "config.yaml").exists()
    assert cluster.client("squeue", "-h", "-n", run_dir.name) == ""
