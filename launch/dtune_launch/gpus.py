"""How many GPUs and cores a job may use, asked without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from dtune_launch.spec import AUTO, LaunchConfig

_DRIVER = Path("/proc/driver/nvidia/gpus")
# Enough to see communication work on a machine without GPUs.
_RANKS_WITHOUT_GPU = 2


def visible_gpus() -> list[str]:
    """NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    present = [str(index) for index in range(count_present())]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not present:
        return present
    devices = [device.strip() for device in visible.split(",")]
    # CUDA ignores what follows the first invalid entry; -1 is the usual one.
    stop = next((i for i, device in enumerate(devices) if device in ("", "-1")), len(devices))
    return devices[:stop]


def count_gpus() -> int:
    """Number of NVIDIA GPUs that this process may use."""
    return len(visible_gpus())


@cache
def count_present() -> int:
    """NVIDIA GPUs of this machine or container, asked once."""
    # nvidia-smi first: inside a container or a job's cgroup /proc may list GPUs of others.
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        listing = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
        if listing.returncode == 0:
            return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    return len(list(_DRIVER.iterdir())) if _DRIVER.is_dir() else 0


def count_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def resolve_nproc(config: LaunchConfig, *, engine: str, gpus: int | None = None) -> int:
    """Processes on a node for ``parallel=<engine>``, ``auto`` resolved.

    ``gpus`` are those that the run may use on this machine, by default all that are visible.
    """
    if config.nproc != AUTO:
        return int(config.nproc)
    if config.gpus_of_node is not None:
        # Of a job's node: what has been asked for is used, or refused with the engine.
        return max(1, config.gpus_of_node)
    if engine == "single":
        return 1
    return (count_gpus() if gpus is None else gpus) or _RANKS_WITHOUT_GPU
