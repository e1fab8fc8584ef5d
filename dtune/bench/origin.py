"""Where a case is measured: the machine, the versions, the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from dtune_launch.gpus import count_cores

from dtune.bench.record import Origin
from dtune.measure.memory import GIB

PACKAGES = (
    "dtune torch transformers peft deepspeed bitsandbytes flash-attn triton numpy "
    "nvidia-cudnn-cu12 nvidia-cudnn-cu13"
).split()
"""Packages whose versions decide how fast a case is; those that are not here are left out."""


def origin_of(command: Sequence[str], *, devices: int) -> Origin:
    """Describe this process's machine, of which ``devices`` take part; imports no package."""
    return Origin(
        command=tuple(command),
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        commit=commit_of(Path(__file__)),
        hardware=hardware(devices),
        versions=versions(),
    )


def hardware(devices: int) -> dict[str, str]:
    """What a case runs on, by name; the name of the host is no part of it."""
    found = {
        "devices": str(devices),
        "cpu": _cpu_name(),
        "cores": str(count_cores()),
        "threads of a process": str(torch.get_num_threads()),
        "memory": f"{_host_memory() / GIB:.0f} GiB",
    }
    if not torch.cuda.is_available():
        return {"device": "cpu", **found}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "device memory": f"{properties.total_memory / GIB:.0f} GiB",
        **found,
    }


def versions() -> dict[str, str]:
    """Versions of what decides the speed, by name."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    # The build, such as 2.13.0+cpu, which the metadata may leave out.
    found["torch"] = torch.__version__
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    if driver := _driver():
        found["driver"] = driver
    return found


def commit_of(file: Path) -> str:
    """Commit of the repository that keeps a file, with ``-dirty``; empty where none does.

    A package that is installed below a repository of something else is not kept by that.
    """
    if not _git(file, "ls-files", "--error-unmatch", file.name):
        return ""
    return _git(file, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(file: Path, *arguments: str) -> str:
    """What git says in the folder of a file; empty where it refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(file.parent), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _driver() -> str:
    """Version of NVIDIA's kernel module; empty where none is loaded."""
    told = Path("/proc/driver/nvidia/version")
    text = told.read_text(encoding="utf-8", errors="replace") if told.is_file() else ""
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", text)
    return found.group(1) if found else ""


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
