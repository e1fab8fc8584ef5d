"""Sweeps whose trials are elements of a SLURM array; the trials pretend to train."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import yaml

from tests.integration.sweeps import (
    DIES,
    FAILS,
    STOPS,
    attempts,
    fake_environment,
    states,
    trial,
)
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LAUNCHER = ("hydra/launcher=dtune_slurm", "hydra.launcher.parallel=2")
NODE = ("launch.gpus_per_node=0", "launch.nproc=1", "launch.shared_disk=true")


def call(cluster: Cluster, *arguments: str, code: int = 0, step_seconds: float = 0) -> str:
    """``dtune ...`` on a machine from which the cluster is used; what it prints."""
    env = {**fake_environment(step_seconds), "OMP_NUM_THREADS": "1"}
    command = (sys.executable, "-m", "dtune", *arguments)
    done = cluster.run(*command, env={**os.environ, **env}, timeout=500)
    assert done.returncode == code, done.stdout + done.stderr + cluster.logs()
    return done.stdout


def test_an_element_that_fails_or_is_preempted_hides_no_other_and_resume_runs_it_elsewhere(
    cluster: Cluster, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    out = call(
        cluster,
        *("train", "-m", *LAUNCHER, "launch=slurm", *NODE, "launch.max_requeues=0"),
        *(f"seed=1,{FAILS},{DIES},{STOPS},2", f"hydra.sweep.dir={sweep}"),
    )
    (job,) = re.findall(r"job (\d+); logs", out)
    assert f"dtune sweep status {sweep}" in out
    script = (sweep / "array-0.sbatch").read_text()
    assert "#SBATCH --array=0-4%2\n" in script
    assert [trial(sweep, n)["attempts"][0]["job"] for n in range(5)] == [
        f"{job}_{n}" for n in range(5)
    ]
    told = call(cluster, "sweep", "status", str(sweep), "-f", "--seconds=0.5", code=1)
    assert states(told) == {0: "done", 1: "failed", 2: "failed", 3: "preempted", 4: "done"}
    # Nothing is left in the queue, so exactly the three are run, here on this machine.
    out = call(cluster, "sweep", "resume", str(sweep), "hydra/launcher=dtune_local", "launch=local")
    assert "3 of 5 trials" in out
    assert states(out) == dict.fromkeys(range(5), "done")
    assert attempts(sweep) == [1, 2, 2, 2, 1]
    frozen = [yaml.safe_load((sweep / str(n) / "config.yaml").read_text()) for n in range(5)]
    assert [one["launch"]["name"] for one in frozen] == ["slurm", *["local"] * 3, "slurm"]


def test_a_search_on_a_cluster_ends_hopeless_trials_without_a_requeue(
    cluster: Cluster, tmp_path: Path
) -> None:
    pytest.importorskip("optuna")
    sweep = tmp_path / "sweep"
    out = call(
        cluster,
        *("train", "-m", *LAUNCHER, "launch=slurm_srun", *NODE, "hydra.launcher.poll_seconds=0.2"),
        *("hydra/sweeper=dtune_optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.seed=5"),
        *("hydra.sweeper.prune_after_trials=1", "hydra.sweeper.sampler=random"),
        *("optim.lr=tag(log,interval(1e-6,1e-1))", f"hydra.sweep.dir={sweep}"),
        step_seconds=2,
    )
    told = states(call(cluster, "sweep", "status", str(sweep)))
    assert set(told.values()) == {"done", "pruned"}, out
    pruned = [number for number, state in told.items() if state == "pruned"]
    for number in pruned:
        record = trial(sweep, number)
        assert record["pruned"]["value"] > 0
        job = record["attempts"][0]["job"]
        assert cluster.show(job)["Restarts"] == "0"
        assert cluster.state(job) == "FAILED"  # 75: saved, and not requeued.
    assert "hydra.sweeper.pruner=median" in trial(sweep, pruned[0])["pruned"]["why"]


def test_a_refusal_of_the_cluster_loses_nothing(cluster: Cluster, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    arguments = ("train", "-m", *LAUNCHER, "launch=slurm", *NODE, "seed=1,2")
    done = cluster.run(
        *(sys.executable, "-m", "dtune", *arguments, f"hydra.sweep.dir={sweep}"),
        "launch.account=nobody",
        'launch.sbatch_options=["--reservation=none"]',
        timeout=500,
    )
    assert done.returncode == 2
    assert "eservation" in done.stderr
    assert f"dtune sweep resume {sweep}" in done.stderr
    told = call(cluster, "sweep", "status", str(sweep), code=75)
    assert states(told) == {0: "not started", 1: "not started"}
