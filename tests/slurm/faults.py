"""What clusters do to a run, done to real training on the tests' cluster, and what came of it.

For the tests of this folder, and for longer trials: ``python -m tests.slurm.faults`` times a
preemption on an idle machine, several times, and prints JSON.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.faults.injection import exported, leftovers, newest_step, numbers, state_digest
from tests.slurm.cluster import Cluster, one_host_cluster
from tests.slurm.training import (
    EVERY,
    HOLD_AT,
    STEPS,
    TWO_RANKS,
    environment,
    steps_of,
    submit_script,
    wait_for_step,
)

LOST_NODE = "n4"
_AROUND = ("--nodes=2", "--nodelist=n3,n4")
_ELSEWHERE = ("--nodes=2", "--exclude=n3,n4")
Submit = Callable[..., str]
"""Submits training to the cluster; see `submit_script`."""


@dataclass(frozen=True)
class Ended:
    """A job that has come to its end."""

    job: str
    run_dir: Path
    output: str
    """Of its batch script, over all attempts."""
    restarts: int
    seconds: float = 0.0
    """From what was done to it to its first step after it had gone on; 0: nothing was."""

    def digest(self) -> str:
        """Hash of the weights that it exported."""
        return exported(self.run_dir)


def finish(cluster: Cluster, job: str, run_dir: Path, seconds: float = 0.0) -> Ended:
    """Wait for the end of a job that is to succeed."""
    cluster.wait_for(job, "COMPLETED", timeout=500)
    record = cluster.show(job)
    output = Path(record["StdOut"]).read_text()
    return Ended(job, run_dir, output, int(record["Restarts"]), seconds)


def start_whole(cluster: Cluster, run_dir: Path, *, submit: Submit = submit_script) -> str:
    """Submit a run to which nothing will happen, away from the node that `lose_node` takes."""
    return submit(cluster, run_dir, *TWO_RANKS, options=_ELSEWHERE)


def preempt(cluster: Cluster, run_dir: Path, *, submit: Submit = submit_script) -> Ended:
    """Ask a run's job to stop, as SLURM does before the time limit; seconds to its next step."""
    env = environment(hold_at=HOLD_AT)
    job = submit(cluster, run_dir, *TWO_RANKS, options=_ELSEWHERE, env=env)
    wait_for_step(cluster, job, run_dir, HOLD_AT - 1)
    start = time.monotonic()
    cluster.client("scancel", "--batch", "--signal=USR1", job)
    wait_for_step(cluster, job, run_dir, HOLD_AT + 1)
    return finish(cluster, job, run_dir, time.monotonic() - start)


def reach_time_limit(cluster: Cluster, run_dir: Path, *, submit: Submit = submit_script) -> Ended:
    """Let a run come near its real time limit of a minute; seconds from its signal to a step."""
    options = (*_ELSEWHERE, "--time=1", "--signal=B:USR1@30")
    env = environment(hold_at=HOLD_AT)
    job = submit(cluster, run_dir, *TWO_RANKS, options=options, env=env)
    output = Path(cluster.show(job)["StdOut"])
    cluster.wait_until(
        lambda: output.is_file() and "USR1, saving" in output.read_text(), "a signal", job=job
    )
    start = time.monotonic()
    wait_for_step(cluster, job, run_dir, HOLD_AT + 1)
    return finish(cluster, job, run_dir, time.monotonic() - start)


def lose_node(
    cluster: Cluster, run_dir: Path, *, kill: bool = False, submit: Submit = submit_script
) -> Ended:
    """Take a node from a running job: said to be down, or really, by SIGKILL of all that is on it.

    Seconds from the loss to the next step; the node comes back. SLURM notices a killed one after
    ``Shape.node_timeout``.
    """
    env = environment(hold_at=HOLD_AT)
    job = submit(cluster, run_dir, *TWO_RANKS, options=_AROUND, env=env)
    wait_for_step(cluster, job, run_dir, HOLD_AT - 1)
    # It is written beside the steps that follow.
    cluster.wait_until(lambda: newest_step(run_dir) >= HOLD_AT - EVERY, "it saves", job=job)
    start = time.monotonic()
    if kill:
        cluster.kill_node(LOST_NODE)
    else:
        cluster.take_down(LOST_NODE)
    cluster.wait_until(lambda: cluster.restarts(job) > 0, "it is requeued", job=job)
    if kill:
        cluster.start_node(LOST_NODE)
    wait_for_step(cluster, job, run_dir, HOLD_AT + 1)
    return finish(cluster, job, run_dir, time.monotonic() - start)


def differences(ended: Ended, whole: Ended) -> list[str]:
    """What a run that went on has other than one to which nothing happened; empty: nothing."""
    resumed = steps_of(ended.run_dir, "resume")
    rows = (ended.run_dir / "metrics.jsonl").read_text().splitlines()
    trained = Counter(row["step"] for row in map(json.loads, rows) if row["kind"] == "train")
    repeated = [step for step, times in trained.items() if times > 1]
    checks = {
        "is requeued": ended.restarts >= 1,
        "goes on each time": len(resumed) == ended.restarts,
        "loses no more than the steps since a save": all(HOLD_AT - s <= EVERY for s in resumed),
        "has every step": set(trained) == set(range(1, STEPS + 1)),
        "repeats no step that was saved": all(step > min(resumed) for step in repeated),
        "has the same state": state_digest(ended.run_dir) == state_digest(whole.run_dir),
        "has the same weights": ended.digest() == whole.digest(),
        "has the same numbers": numbers(ended.run_dir) == numbers(whole.run_dir),
        "leaves nothing behind": leftovers(ended.run_dir) == [],
    }
    return [what for what, holds in checks.items() if not holds]


@dataclass(frozen=True)
class Timing:
    """Seconds from the signal of a preemption to the first step of the resumed run."""

    seconds: list[float]
    machine: str
    cores: int


def time_preemption(folder: Path, times: int = 3) -> Timing:
    """Preempt a two-node run, several times, with nothing else on the machine."""
    seconds = []
    with one_host_cluster() as cluster:
        for number in range(times):
            place = folder / str(number)
            place.mkdir()
            seconds.append(round(preempt(cluster, place / "run").seconds, 1))
    return Timing(seconds, platform.platform(), os.cpu_count() or 1)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        sys.stdout.write(json.dumps(asdict(time_preemption(Path(scratch))), indent=1) + "\n")
