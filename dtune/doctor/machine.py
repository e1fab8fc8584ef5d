"""This machine: versions, devices, and what is missing for what."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from dtune import __version__
from dtune.doctor.table import columns
from dtune.runtime.capabilities import OPTIONAL, how_to_install, is_installed, version

_GIB = 2**30
_DISTRIBUTIONS = (
    "transformers peft datasets tokenizers safetensors hydra-core omegaconf deepspeed triton "
    "bitsandbytes flash-attn tensorboard wandb".split()
)


@dataclass(frozen=True)
class Feature:
    """Something a setting can ask for, and what stands in its way here."""

    setting: str
    problem: str = ""
    """Empty where it works."""
    remedy: str = ""


def report() -> str:
    """Versions, devices, host and features of this machine, as text."""
    sections = (
        ("Versions", columns(_versions())),
        ("Devices", _devices()),
        ("Host", columns(_host())),
        ("Features", columns(_feature_rows(features()))),
    )
    return "\n".join(f"{title}\n{body}\n" for title, body in sections)


def features() -> list[Feature]:
    """Every feature that depends on the machine or on an optional package."""
    return [
        _distributed(),
        Feature("parallel=zero1, zero2, zero3", *_missing("deepspeed")),
        Feature("precision=bf16", *_bf16_problem()),
        Feature("model.attention=flash_attention_2", *_first(_missing("flash_attn"), _no_gpu())),
        Feature("model.attention=varlen", *_older_than((8, 0))),
        Feature("model.attention=flex", *_no_gpu()),
        Feature("train.compile=true", *_first(_no_compiler(), _no_triton())),
        Feature("optim=adamw8bit", *_missing("bitsandbytes")),
        Feature("log=tensorboard", *_missing("tensorboard")),
        Feature("log=wandb", *_missing("wandb")),
    ]


# What stands in the way, and what to do about it; both empty where nothing does.
Problem = tuple[str, str]
_NONE: Problem = ("", "")


def _first(*problems: Problem) -> Problem:
    return next((problem for problem in problems if problem != _NONE), _NONE)


def _missing(module: str) -> Problem:
    if is_installed(module):
        return _NONE
    return f"{OPTIONAL[module].distribution} is not installed", how_to_install(module)


def _no_gpu() -> Problem:
    if torch.cuda.is_available():
        return _NONE
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        return "this torch is a CPU build", "install the CUDA build of torch"
    return "it runs on NVIDIA GPUs, none is visible", "see CUDA_VISIBLE_DEVICES"


def _older_than(wanted: tuple[int, int]) -> Problem:
    if not torch.cuda.is_available():
        return _no_gpu()
    if torch.cuda.get_device_capability() >= wanted:
        return _NONE
    return "the GPU is too old", f"compute capability {wanted[0]}.{wanted[1]} or newer"


def _bf16_problem() -> Problem:
    if not torch.cuda.is_available():
        return _NONE
    problem, _ = _older_than((8, 0))
    return (problem, "precision=fp16") if problem else _NONE


def _no_compiler() -> Problem:
    if shutil.which("g++") or shutil.which("clang++"):
        return _NONE
    return "no C++ compiler on PATH", "install g++"


def _no_triton() -> Problem:
    return _missing("triton") if torch.cuda.is_available() else _NONE


def _distributed() -> Feature:
    setting = "parallel=ddp, fsdp"
    if not dist.is_available():
        return Feature(setting, "torch has no torch.distributed", "install a torch that has")
    if torch.cuda.is_available() and not dist.is_nccl_available():
        return Feature(setting, "torch has no NCCL", "install the CUDA build of torch")
    return Feature(setting)


def _versions() -> Iterable[tuple[str, ...]]:
    yield "dtune", __version__
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    yield "CUDA of torch", torch.version.cuda or "none: a CPU build"
    yield "NCCL", _nccl_version()
    for distribution in _DISTRIBUTIONS:
        yield distribution, version(distribution) or "not installed"


def _nccl_version() -> str:
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        return "none"
    parts = torch.cuda.nccl.version()
    return ".".join(str(part) for part in parts)


def _devices() -> str:
    if not torch.cuda.is_available():
        return "  no NVIDIA GPU: dtune computes on the CPU"
    rows: list[tuple[str, ...]] = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        memory = f"{device.total_memory / _GIB:.0f} GiB"
        rows.append(
            (f"cuda:{index}", device.name, memory, f"compute {device.major}.{device.minor}")
        )
    return f"{columns(rows)}\n  driver {_driver_version()}"


def _driver_version() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown: no nvidia-smi"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[0] if done.returncode == 0 else "unknown"


def _host() -> Iterable[tuple[str, ...]]:
    cores = len(os.sched_getaffinity(0))
    pages, page_size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    disk = shutil.disk_usage(Path.cwd())
    yield "system", platform.platform()
    yield "CPU cores", f"{cores} of {os.cpu_count()}"
    yield "memory", f"{pages * page_size / _GIB:.0f} GiB"
    yield "disk here", f"{disk.free / _GIB:.0f} of {disk.total / _GIB:.0f} GiB free, {Path.cwd()}"


def _feature_rows(found: Iterable[Feature]) -> Iterable[tuple[str, ...]]:
    for feature in found:
        if feature.problem:
            yield feature.setting, "missing", f"{feature.problem}; {feature.remedy}"
        else:
            yield feature.setting, "ready"
