"""``dtune doctor``: what this machine has, or how the nodes of an allocation work together."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from dtune_launch.gpus import count_gpus
from dtune_launch.local import exit_code, run_job
from dtune_launch.spec import JobSpec
from dtune_launch.srun import become_rank, is_task

from dtune.commands.own import ROOTS, Command, split_settings
from dtune.errors import ConfigError

_CLUSTER = "--cluster"

_USAGE = """dtune doctor                       versions, devices, and what is missing for what
dtune doctor --cluster [settings]  ranks, ports, clocks, folder, speed between nodes

Inside an allocation (sbatch, salloc) --cluster starts its ranks on all nodes of it; elsewhere on
this machine. Under torchrun or srun each process is a rank.
"""


def run(argv: list[str]) -> int:
    """Print the report; 1 where the cluster has a problem."""
    if _CLUSTER in argv:
        return _cluster([argument for argument in argv if argument != _CLUSTER])
    if "--help" in argv or "-h" in argv:
        return _help()
    if argv:
        raise ConfigError(f"dtune doctor takes --cluster and no other settings, got {argv[0]}")
    from dtune.doctor.machine import report

    sys.stdout.write(report())
    return 0


def _command() -> Command:
    from dtune.doctor.cluster import ClusterSettings

    return Command(
        name="dtune doctor --cluster",
        usage=_USAGE,
        own=ClusterSettings,
        unused=ROOTS,
        why_unused="looks at nodes, not at a run",
    )


def _help() -> int:
    sys.stdout.write(_command().help())
    return 0


def _cluster(argv: list[str]) -> int:
    """Look at all nodes: as one of the ranks, or by starting them."""
    from dtune.doctor.cluster import ClusterSettings, examine, log_nccl

    command = _command()
    if command.asks_help(argv):
        return _help()
    settings, _ = split_settings(argv, ClusterSettings, command)
    if is_task(os.environ):
        become_rank()
    if "RANK" not in os.environ:
        nproc = int(settings.nproc) if settings.nproc != "auto" else count_gpus() or 2
        in_allocation = "SLURM_JOB_ID" in os.environ
        return _start_tasks(argv, nproc) if in_allocation else _start_ranks(argv, nproc)
    from dtune.runtime.world import World

    log = log_nccl()
    world = World.start()
    found = examine(world, settings, log)
    if world.is_first:
        sys.stdout.write(found.text)
    world.barrier()
    world.stop()
    return 1 if found.problems else 0


def _start_tasks(argv: list[str], nproc: int) -> int:
    """Ranks on all nodes of the allocation."""
    nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    command = [
        *("srun", f"--nodes={nodes}", f"--ntasks-per-node={nproc}"),
        # Else srun takes the number of tasks, and one core for each, from the allocation.
        *(f"--ntasks={nodes * nproc}", "--overcommit"),
        *("--kill-on-bad-exit=1", sys.executable, "-m", "dtune_launch.srun"),
        *("dtune", "doctor", _CLUSTER, *argv),
    ]
    return exit_code(subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode)


def _start_ranks(argv: list[str], nproc: int) -> int:
    """Ranks on this machine."""
    with tempfile.TemporaryDirectory(prefix="dtune-doctor-") as folder:
        arguments = ("doctor", _CLUSTER, *argv)
        return run_job(
            JobSpec(module="dtune", arguments=arguments, run_dir=Path(folder), nproc=nproc)
        )
