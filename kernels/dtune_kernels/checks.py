"""Checks of arguments, made before anything is launched."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dtune_kernels.errors import KernelArgumentError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check(condition: bool, op: str, argument: str, *, got: object, wanted: object) -> None:
    """Raise KernelArgumentError unless the condition holds."""
    if not condition:
        raise KernelArgumentError(f"{op}: {argument} is {got}, wanted {wanted}")


def check_dtype(op: str, argument: str, x: torch.Tensor, wanted: Sequence[torch.dtype]) -> None:
    """Raise KernelArgumentError unless the tensor has one of the dtypes."""
    check(x.dtype in wanted, op, f"dtype of {argument}", got=x.dtype, wanted=_either(wanted))


def check_shape(op: str, argument: str, x: torch.Tensor, wanted: Sequence[int | None]) -> None:
    """Raise KernelArgumentError unless the shape is as wanted; None stands for any size."""
    fits = x.dim() == len(wanted) and all(
        size is None or size == own for size, own in zip(wanted, x.shape, strict=True)
    )
    shown = ", ".join("any" if size is None else str(int(size)) for size in wanted)
    check(fits, op, f"shape of {argument}", got=list(x.shape), wanted=f"[{shown}]")


def check_device(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise KernelArgumentError unless all tensors are on the device of the first."""
    first = next(x for x in tensors.values() if x is not None)
    for argument, x in tensors.items():
        if x is not None:
            check(
                x.device == first.device,
                op,
                f"device of {argument}",
                got=x.device,
                wanted=first.device,
            )


def _either(values: Sequence[object]) -> str:
    return " or ".join(str(value) for value in values)
