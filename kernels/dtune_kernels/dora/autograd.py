"""A frozen linear with a DoRA adapter, with its gradients.

Size legend: T tokens, K features in, O features out, R rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dtune_kernels.checks import FLOATS, check, check_device, check_dtype, check_shape
from dtune_kernels.dora import ops
from dtune_kernels.layout import dense_rows
from dtune_kernels.library import apply
from dtune_kernels.lora import ops as lora
from dtune_kernels.lora.types import Linear, Norm, check_input, check_linear
from dtune_kernels.rms_norm import ops as rms_norm
from dtune_kernels.rms_norm import rms_norm as apply_rms_norm
from dtune_kernels.weights import FrozenWeight

OP = "dora_linear"


class _Settings(NamedTuple):
    """What is no tensor of the call."""

    weight: FrozenWeight
    """Which kind it is; its tensors are arguments."""
    scale: float
    dropout: float
    eps: float
    gemma: bool


def _dense(
    weight: FrozenWeight, kept: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Return the weight [O, K] that is kept in the tensors."""
    if isinstance(weight, torch.Tensor):
        return kept[0].to(dtype)
    return weight.with_tensors(kept).dequantize(dtype)


class _DoraLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        magnitude: torch.Tensor,
        bias: torch.Tensor | None,
        norm_weight: torch.Tensor | None,
        seed: torch.Tensor | None,
        settings: _Settings,
        *kept: torch.Tensor,
    ) -> torch.Tensor:
        rows, rstd, scale = x, None, settings.scale
        if norm_weight is not None:
            rows, rstd = rms_norm.forward(x, norm_weight, settings.eps, settings.gemma)
            rows = rows.to(x.dtype)
        weight = _dense(settings.weight, kept, x.dtype)
        row_norm = ops.norm(weight, a, b, scale)
        gain = magnitude.to(row_norm.dtype) / row_norm
        p = lora.project(rows, [a], seed, [settings.dropout])
        y0 = rows @ weight.t()
        y: torch.Tensor = ops.scaled(y0, p, b, scale, gain, bias)
        # Without bias, y tells what y0 would, and y is what the next layer keeps anyway.
        base: torch.Tensor = y if bias is None else y0
        ctx.save_for_backward(
            x, a, b, magnitude, bias, norm_weight, seed, rstd, row_norm, gain, p, base, *kept
        )
        ctx.settings = settings
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, magnitude, bias, norm_weight, seed, rstd, row_norm, gain, p, base, *kept = (
            ctx.saved_tensors
        )
        settings: _Settings = ctx.settings
        dy, rates, scale = dense_rows(dy), [settings.dropout], settings.scale
        if bias is None:
            own = magnitude.to(gain.dtype)
            dv, dm = ops.scaled_backward(dy, base, None, None, scale, gain, own)
        else:
            dv, dm = ops.scaled_backward(dy, base, p, b, scale, gain, row_norm)
        ds, (db,) = lora.grad_b([dv], p, [b], [0], [scale])
        (da,) = lora.grad_a(x, ds, [a], seed, rates, rstd, norm_weight, settings.gemma)
        dx, dw = None, None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[5]:
            dx = dv @ _dense(settings.weight, tuple(kept), x.dtype)
            lora.expand_([dx], ds, [a.t()], [0], [1.0], seed, rates)
            if norm_weight is not None:
                trained = ctx.needs_input_grad[5]
                dx, dw = rms_norm.backward(dx, x, rstd, norm_weight, None, settings.gemma, trained)
                dw = dw if trained else None
        dbias = dy.sum(0, dtype=gain.dtype).to(bias.dtype) if ctx.needs_input_grad[4] else None
        return dx, da, db, dm.to(magnitude.dtype), dbias, dw, None, None, *[None] * len(kept)


def dora_linear(
    x: torch.Tensor, linear: Linear, magnitude: torch.Tensor, *, norm: Norm | None = None
) -> torch.Tensor:
    """Return m / ||W + s B A|| * (x W^T + s drop(x) A^T B^T) + bias.

    Args:
        x: [..., K], any strides; under autocast it is cast to its dtype.
        linear: Of W [O, K], which is frozen and cast to the dtype of x, and one adapter. A
            quantised W is dequantised once in the forward and once in the backward.
        magnitude: m [O], not 0.
        norm: RMSNorm of x before it, whose result is then not kept for the backward. None: none.

    Returns:
        [..., O]. Can be differentiated once.

    Raises:
        KernelArgumentError: A shape, dtype or device does not fit.

    Liu et al. 2024, arXiv:2402.09353, eq. 5. The norm, that of each row, takes part in no gradient
    (sec. 4.3). Only what the adapter reads is dropped out; PEFT drops it from the base term's
    share in the difference to the base layer as well, which is equal in expectation, and is the
    same without dropout. Dropout draws its seed from the generator of x's device.
    """
    check_input(OP, x, norm)
    check_linear(OP, "linear", linear, inputs=x.shape[-1], x=x)
    count = len(linear.adapters)
    check(count == 1, OP, "number of adapters", got=count, wanted=1)
    weight, (adapter,) = linear.weight, linear.adapters
    check_dtype(OP, "magnitude", magnitude, FLOATS)
    check_shape(OP, "magnitude", magnitude, adapter.b.shape[:1])
    check_device(OP, x=x, magnitude=magnitude)
    dtype, rows, folded = _product_dtype(x), dense_rows(x), norm
    if norm is not None and x.dtype != dtype:
        # What the fold computes again is rounded to the dtype of x.
        rows = apply_rms_norm(rows, norm.weight, eps=norm.eps, gemma=norm.gemma)
        folded = None
    seed = None
    if adapter.dropout:
        seed = torch.randint(0, 2**63 - 1, (1,), device=x.device)
    settings = _Settings(
        weight,
        adapter.scale,
        adapter.dropout,
        0.0 if folded is None else folded.eps,
        folded is not None and folded.gemma,
    )
    y: torch.Tensor = apply(
        _DoraLinear,
        rows.to(dtype),
        adapter.a,
        adapter.b,
        magnitude,
        linear.bias,
        None if folded is None else folded.weight,
        seed,
        settings,
        *((weight,) if isinstance(weight, torch.Tensor) else weight.tensors()),
    )
    return y.view(*x.shape[:-1], y.shape[-1])


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    device = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
