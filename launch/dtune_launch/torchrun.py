"""From a job to torchrun's command line and environment: pure functions."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from dtune_launch.spec import JobSpec

# torchrun maps ranks to outputs by a single digit ("0:3,1:3").
_LARGEST_MAPPING = 10


def worker_command(spec: JobSpec) -> list[str]:
    """Command of a job of one process: the module itself, without an agent."""
    return [sys.executable, "-m", spec.module, *spec.arguments]


def torchrun_command(spec: JobSpec) -> list[str]:
    """Command of a job of several processes on this machine: torchrun's agent and its options.

    The first rank writes to the terminal, the others to files under ``RUN/logs``.
    """
    outputs: list[str] = []
    if 1 < spec.nproc <= _LARGEST_MAPPING:
        others = ",".join(f"{rank}:3" for rank in range(1, spec.nproc))
        outputs = [f"--redirects={others}"]
    elif spec.nproc > 1:
        outputs = ["--redirects=3", "--tee=0:3"]
    return [
        sys.executable,
        "-m",
        "dtune_launch.agent",
        "--nnodes=1",
        f"--nproc-per-node={spec.nproc}",
        f"--max-restarts={spec.max_restarts}",
        "--rdzv-backend=c10d",
        # Port 0: the agent takes a free one. By address, as a host's own name may not resolve.
        "--rdzv-endpoint=127.0.0.1:0",
        "--rdzv-id=ranks",
        "--local-addr=127.0.0.1",
        f"--log-dir={spec.run_dir / 'logs'}",
        *outputs,
        "--module",
        spec.module,
        *spec.arguments,
    ]


def job_environment(spec: JobSpec, base: Mapping[str, str], cores: int) -> dict[str, str]:
    """Variables to add to ``base`` for the job; what the user has set stays."""
    added = {
        "PYTHONUNBUFFERED": "1",
        # torch 2.13: a restart would read the addresses of the attempt before it from the agent's
        # shared store, and half of all restarts hang or fail.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        # Seconds that a stopped job has to save; torchrun kills after 30 by itself.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600",
    }
    if spec.nproc > 1:
        # Else every process takes all cores.
        added["OMP_NUM_THREADS"] = str(max(1, cores // spec.nproc))
    kept = {name: value for name, value in added.items() if name not in base}
    return {**kept, **spec.env}
