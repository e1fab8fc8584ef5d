"""Linears with adapters, as the LoRA functions take them.

Size legend: K features in, O features out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dtune_kernels.checks import FLOATS, check, check_device, check_dtype, check_shape
from dtune_kernels.weights import FrozenWeight


@dataclass(frozen=True)
class Adapter:
    """A low-rank addition: scale * (drop(x) A^T) B^T."""

    a: torch.Tensor
    """[R, K], any float dtype; gets its gradient in it."""
    b: torch.Tensor
    """[O, R], any float dtype; gets its gradient in it."""
    scale: float
    dropout: float = 0.0
    """Probability that an element of x is dropped; 0 when not training."""


@dataclass(frozen=True)
class Linear:
    """x W^T + bias and the adapters of it."""

    weight: FrozenWeight
    """[O, K], not trained."""
    bias: torch.Tensor | None = None
    """[O], trained or not."""
    adapters: tuple[Adapter, ...] = ()


@dataclass(frozen=True)
class Norm:
    """The RMSNorm before a group of linears; see ``rms_norm.rms_norm``."""

    weight: torch.Tensor
    """[K], trained or not."""
    eps: float
    gemma: bool


def shape_of(weight: FrozenWeight) -> tuple[int, ...]:
    """[O, K] of a weight, kept as it may be."""
    return tuple(weight.shape)


def check_input(op: str, x: torch.Tensor, norm: Norm | None) -> None:
    """Raise KernelArgumentError unless x and the norm fit each other."""
    check_dtype(op, "x", x, FLOATS)
    check(x.dim() > 0, op, "shape of x", got=list(x.shape), wanted="[..., features]")
    check(
        x.dtype != torch.float64 or x.device.type == "cpu",
        op,
        "dtype of x",
        got=x.dtype,
        wanted="32 or 16 bits on a device that is not the CPU",
    )
    if norm is not None:
        check_dtype(op, "norm.weight", norm.weight, FLOATS)
        check_shape(op, "norm.weight", norm.weight, x.shape[-1:])
        check_device(op, x=x, **{"norm.weight": norm.weight})


def check_linear(op: str, name: str, linear: Linear, *, inputs: int, x: torch.Tensor) -> None:
    """Raise KernelArgumentError unless the linear takes rows of ``inputs`` features beside x."""
    shape = shape_of(linear.weight)
    fits = len(shape) == 2 and shape[1] == inputs
    check(fits, op, f"shape of {name}.weight", got=list(shape), wanted=f"[any, {inputs}]")
    if isinstance(linear.weight, torch.Tensor):
        check_dtype(op, f"{name}.weight", linear.weight, FLOATS)
        check(
            not linear.weight.requires_grad,
            op,
            f"{name}.weight",
            got="a trained weight",
            wanted="a frozen one: its gradient is not computed",
        )
        check_device(op, x=x, **{f"{name}.weight": linear.weight})
    if linear.bias is not None:
        check_dtype(op, f"{name}.bias", linear.bias, FLOATS)
        check_shape(op, f"{name}.bias", linear.bias, shape[:1])
        check_device(op, x=x, **{f"{name}.bias": linear.bias})
    for index, adapter in enumerate(linear.adapters):
        _check_adapter(op, f"{name}.adapters[{index}]", adapter, shape, x)


def _check_adapter(
    op: str, name: str, adapter: Adapter, shape: Sequence[int], x: torch.Tensor
) -> None:
    outputs, inputs = shape
    check_dtype(op, f"{name}.a", adapter.a, FLOATS)
    check_dtype(op, f"{name}.b", adapter.b, FLOATS)
    check_shape(op, f"{name}.a", adapter.a, (None, inputs))
    rank = adapter.a.shape[0]
    check(rank > 0, op, f"shape of {name}.a", got=[rank, inputs], wanted="a rank of at least 1")
    check_shape(op, f"{name}.b", adapter.b, (outputs, rank))
    check_device(op, x=x, **{f"{name}.a": adapter.a, f"{name}.b": adapter.b})
    rate = adapter.dropout
    check(0 <= rate < 1, op, f"{name}.dropout", got=rate, wanted="at least 0 and below 1")
