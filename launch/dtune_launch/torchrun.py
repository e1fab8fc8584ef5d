"""From a job to torchrun's command line and environment: pure functions."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from dtune_launch.spec import JobSpec

# torchrun maps ranks to outputs by a single digit ("0:3,1:3").
_LARGEST_MAPPING = 10

TORCHRUN_ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    # torch 2.13: a restart would read the addresses of the attempt before it from the agent's
    # shared store, and half of all restarts hang or fail.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}
"""What every torchrun is given, unless the user has set it."""

_BEYOND_SAVE_SECONDS = 300
"""For the step before the save, and for the watchers, who end a save that hangs."""
_DAY_SECONDS = 86400


def worker_command(spec: JobSpec) -> list[str]:
    """Command of a job of one process: the module itself, without an agent."""
    return [sys.executable, "-m", spec.module, *spec.arguments]


def torchrun_command(spec: JobSpec) -> list[str]:
    """Command of this machine's part of a job: torchrun's agent and its options.

    The first rank writes to the terminal, the others to files under ``RUN/logs``.
    """
    return [
        sys.executable,
        "-m",
        "dtune_launch.agent",
        f"--nnodes={spec.nodes}",
        f"--nproc-per-node={spec.nproc}",
        f"--max-restarts={spec.max_restarts}",
        "--rdzv-backend=c10d",
        # Port 0: the agent takes a free one. By address, as a host's own name may not resolve.
        f"--rdzv-endpoint={spec.head}",
        *_who_is_host(spec),
        "--rdzv-id=ranks",
        f"--local-addr={spec.local_addr}",
        f"--log-dir={spec.run_dir / 'logs'}",
        *_outputs(spec.nproc),
        "--module",
        spec.module,
        *spec.arguments,
    ]


def _who_is_host(spec: JobSpec) -> list[str]:
    # torch would guess by comparing names, which need not resolve.
    return [] if spec.nodes == 1 else [f"--rdzv-conf=is_host={int(spec.node_rank == 0)}"]


def node_options(environ: Mapping[str, str]) -> list[str]:
    """Options of the agent of one node of a Slurm job: what differs between the nodes."""
    addresses = environ.get("DTUNE_NODE_ADDRESSES", "").split()
    if not addresses:
        return []
    node = int(environ["SLURM_NODEID"])
    return [f"--local-addr={addresses[node]}", f"--rdzv-conf=is_host={int(node == 0)}"]


def _outputs(nproc: int) -> list[str]:
    if nproc == 1:
        return []
    if nproc <= _LARGEST_MAPPING:
        return [f"--redirects={','.join(f'{rank}:3' for rank in range(1, nproc))}"]
    return ["--redirects=3", "--tee=0:3"]


def shutdown_seconds(save_seconds: float) -> int:
    """Seconds that a stopped job has to end; torchrun kills after 30 by itself.

    More than a save may take, by ``watch.save``; ``job.sh`` has the same.
    """
    if save_seconds < 1:
        return _DAY_SECONDS
    return int(save_seconds) + _BEYOND_SAVE_SECONDS


def job_environment(spec: JobSpec, base: Mapping[str, str], cores: int) -> dict[str, str]:
    """Variables to add to ``base`` for the job; what the user has set stays."""
    shutdown = str(shutdown_seconds(spec.save_seconds))
    added = {**TORCHRUN_ENVIRONMENT, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": shutdown}
    if spec.nproc > 1:
        # Else every process takes all cores.
        added["OMP_NUM_THREADS"] = str(max(1, cores // spec.nproc))
    kept = {name: value for name, value in added.items() if name not in base}
    return {**kept, **spec.env}
