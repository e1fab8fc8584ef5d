"""``dtune doctor``: what this machine has, or how the nodes of an allocation work together."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from dtune_launch.gpus import count_gpus
from dtune_launch.local import run_job
from dtune_launch.spec import JobSpec

from dtune.commands.own import ROOTS, Command, split_settings
from dtune.errors import ConfigError

_CLUSTER = "--cluster"

_USAGE = """dtune doctor                       versions, devices, and what is missing for what
dtune doctor --cluster [settings]  ranks, ports, clocks, folder, speed between nodes

--cluster starts its ranks on this machine. For several, start it by torchrun on each of them:
torchrun --nnodes=2 --nproc-per-node=8 ... -m dtune doctor --cluster
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
    if "RANK" not in os.environ:
        return _start_ranks(argv, settings.nproc)
    from dtune.runtime.world import World

    log = log_nccl()
    world = World.start()
    found = examine(world, settings, log)
    if world.is_first:
        sys.stdout.write(found.text)
    world.barrier()
    world.stop()
    return 1 if found.problems else 0


def _start_ranks(argv: list[str], nproc: str) -> int:
    with tempfile.TemporaryDirectory(prefix="dtune-doctor-") as folder:
        return run_job(
            JobSpec(
                module="dtune",
                arguments=("doctor", _CLUSTER, *argv),
                run_dir=Path(folder),
                nproc=int(nproc) if nproc != "auto" else count_gpus() or 2,
            )
        )
