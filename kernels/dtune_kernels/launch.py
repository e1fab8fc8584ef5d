"""How Triton kernels are started, and whether they can be."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dtune_kernels.errors import KernelUnavailable

Launch = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]
"""A kernel, its grid, its arguments, its constants and options."""

_recorders: list[list[Launch]] = []


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start a Triton kernel on the device of its first tensor; an empty grid starts nothing.

    ``options`` are the kernel's ``tl.constexpr`` parameters, ``num_warps`` and ``num_stages``.
    Within ``recorded`` the launch is noted instead.
    """
    if 0 in grid:
        return
    if _recorders:
        _recorders[-1].append((kernel, grid, arguments, options))
        return
    device = next(_tensors(arguments)).device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)
    else:
        kernel[grid](*arguments, **options)


def _tensors(arguments: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    """Tensors among the arguments, also those in tuples."""
    for x in arguments:
        if isinstance(x, torch.Tensor):
            yield x
        elif isinstance(x, tuple):
            yield from _tensors(x)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Note the launches in the list that is given instead of making them.

    With tensors on the meta device this counts launches and gives what is compiled ahead of time.
    """
    launches: list[Launch] = []
    _recorders.append(launches)
    try:
        yield launches
    finally:
        _recorders.pop()


def triton_problem(device: torch.device) -> str:
    """Why Triton kernels cannot run on the device; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type != "cuda":
        return f"it needs a CUDA or ROCm device, this is {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    return ""


def require_triton(device: torch.device, *, key: str) -> None:
    """Raise KernelUnavailable with the reason, and ``key``, the setting that asks for Triton."""
    problem = triton_problem(device)
    if problem:
        raise KernelUnavailable(
            f"{key}=triton cannot run here: {problem}; set {key}=auto or {key}=torch"
        )


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot`` for operands of a dtype: PyTorch's own switch for TF32.

    ``allow_tf32`` and ``set_float32_matmul_precision`` set ``fp32_precision`` as well; reading
    ``allow_tf32`` raises where the latter was set alone.
    """
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def next_power_of_two(size: int) -> int:
    """Smallest power of two that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()


@functools.cache
def pipeliner_fails(device: torch.device) -> bool:
    """Whether Triton fails to pipeline a loop in which one computed tile feeds several dots.

    Triton 3.6 does, for compute capability 10: an assertion in Schedule.cpp.
    """
    # TODO(triton>=3.7): drop this once torch 2.11, which comes with 3.6, is no longer taken.
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    version = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    return version < (3, 7) and torch.cuda.get_device_capability(device)[0] >= 10


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the device; 132, those of an H100 or H200, where there is none."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 132
