"""Real training in jobs of the tests' cluster: the tiny model, a few steps."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dtune.train.sinks.base import Row
from dtune.train.sinks.jsonl import read_metrics
from tests.integration.train_runs import settings
from tests.slurm.cluster import Cluster

SCRIPT = Path(__file__).parents[2] / "slurm" / "train.sbatch"
SLOWED = Path(__file__).parents[1] / "injected"
STEPS = 30
EVERY = 5
HOLD_AT = 13
"""The step before which a run waits for its signal; not one that is saved anyway."""
TWO_RANKS = ("parallel=ddp", "peft.dropout=0.1")
# The nodes are this one machine: they share /tmp.
SHARED = "launch.shared_disk=true"
TWO_NODES = ("launch.nodes=2", "launch.gpus_per_node=1", SHARED)


def overrides(run_dir: Path, *more: str) -> list[str]:
    """Settings of a run; ``more`` wins."""
    return settings(run_dir, f"train.max_steps={STEPS}", f"checkpoint.every={EVERY}", *more)


def environment(*, hold_at: int = 0, slow_save: float = 0.0) -> dict[str, str]:
    """What a job needs in its environment, and what makes it wait; see ``injected_waits``."""
    given = {"DTUNE_PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if hold_at:
        given["DTUNE_TEST_HOLD_AT"] = str(hold_at)
        given["DTUNE_TEST_SLOW_SAVE"] = str(slow_save)
        given["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(SLOWED), os.environ.get("PYTHONPATH", "")])
        )
    return given


def submit_script(
    cluster: Cluster,
    run_dir: Path,
    *more: str,
    options: tuple[str, ...] = ("--nodes=2",),
    env: dict[str, str] | None = None,
) -> str:
    """``sbatch slurm/train.sbatch ...`` as one types it; the job's id."""
    command = (*options, str(SCRIPT), *overrides(run_dir, *more))
    return cluster.submit(*command, cwd=run_dir.parent, env=env or environment())


def submit_dtune(
    cluster: Cluster,
    run_dir: Path,
    *more: str,
    options: tuple[str, ...] = ("--nodes=2",),
    env: dict[str, str] | None = None,
    launcher: str = "slurm",
) -> str:
    """``dtune train launch=slurm ...`` with one process on each of two nodes; the job's id.

    ``options`` are sbatch's, without those that dtune writes itself.
    """
    beside = ",".join(f"'{option}'" for option in options if not option.startswith("--nodes"))
    settings = (f"launch={launcher}", *TWO_NODES, f"launch.sbatch_options=[{beside}]")
    done = call_dtune(cluster, "train", *overrides(run_dir, *more, *settings), env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1]


def call_dtune(
    cluster: Cluster, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``dtune ...`` on a machine from which the cluster is used."""
    return cluster.run(
        *(sys.executable, "-m", "dtune", *arguments),
        env={**os.environ, **environment(), **(env or {})},
    )


def rows(run_dir: Path) -> list[Row]:
    """metrics.jsonl as far as it is; empty before the first line."""
    path = run_dir / "metrics.jsonl"
    return read_metrics(path) if path.is_file() else []


def steps_of(run_dir: Path, kind: str) -> list[int]:
    """Steps of the rows of a kind, in order."""
    return [int(row["step"]) for row in rows(run_dir) if row["kind"] == kind]


def wait_for_step(cluster: Cluster, job: str, run_dir: Path, step: int) -> None:
    """Wait until a step has been logged."""

    def is_logged() -> bool:
        if step in steps_of(run_dir, "train"):
            return True
        cluster.wait_for(job, "PENDING", "RUNNING", "COMPLETED")
        return False

    cluster.wait_until(is_logged, f"step {step} of {run_dir.name}", job=job)
