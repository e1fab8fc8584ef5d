"""A rank that srun has started: ``python -m dtune_launch.srun MODULE ARGUMENTS``.

Slurm says by its own variables which task this is; torch is told by those that torchrun sets.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Mapping


def is_task(environ: Mapping[str, str]) -> bool:
    """Whether this process is one of several tasks that srun has started, and no rank as yet.

    A batch script and a shell in an allocation have variables of Slurm as well, and are no tasks.
    """
    several = int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return several and "SLURM_PROCID" in environ and "RANK" not in environ


def rank_variables(environ: Mapping[str, str], head: str) -> dict[str, str]:
    """The variables of a rank, from those of Slurm's task; ``head`` is the first node's address."""
    tasks = int(environ["SLURM_STEP_NUM_TASKS"])
    nodes = int(environ["SLURM_STEP_NUM_NODES"])
    if tasks % nodes:
        raise ValueError(
            f"{tasks} tasks on {nodes} nodes: each node needs the same number of them, "
            "--ntasks-per-node"
        )
    port = 20000 + int(environ["SLURM_JOB_ID"]) % 10000
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks // nodes),
        "MASTER_ADDR": environ.get("MASTER_ADDR", head),
        "MASTER_PORT": environ.get("MASTER_PORT", str(port)),
        # srun with --kill-on-bad-exit would kill ranks that still save.
        "DTUNE_SRUN": "1",
    }


def head_address(environ: Mapping[str, str]) -> str:
    """Address of the first node of the step, by which Slurm itself reaches it."""
    if "MASTER_ADDR" in environ:
        return environ["MASTER_ADDR"]
    names = _scontrol("show", "hostnames", environ["SLURM_STEP_NODELIST"]).split()
    facts = _scontrol("show", "node", names[0], "-o").split()
    return next(fact.removeprefix("NodeAddr=") for fact in facts if fact.startswith("NodeAddr="))


def become_rank() -> None:
    """Give this process the variables of its rank."""
    os.environ.update(rank_variables(os.environ, head_address(os.environ)))


def _scontrol(*arguments: str) -> str:
    done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    become_rank()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
