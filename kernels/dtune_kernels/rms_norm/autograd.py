"""RMSNorm with its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function

from dtune_kernels.checks import FLOATS, check_device, check_dtype, check_shape
from dtune_kernels.layout import dense_rows
from dtune_kernels.library import apply
from dtune_kernels.rms_norm import ops


class _RmsNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, gemma: bool
    ) -> torch.Tensor:
        rows = dense_rows(x)
        y, rstd = ops.forward(rows, weight, eps, gemma)
        ctx.save_for_backward(rows, rstd, weight)
        ctx.gemma, ctx.shape = gemma, x.shape
        out: torch.Tensor = y.view(x.shape)
        return out

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, rstd, weight = ctx.saved_tensors
        weight_grad = ctx.needs_input_grad[1]
        dx, dw = ops.backward(dense_rows(dy), x, rstd, weight, None, ctx.gemma, weight_grad)
        return dx.view(ctx.shape), dw if weight_grad else None, None, None


class _AddRmsNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        gemma: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        y, h, rstd = ops.add_forward(dense_rows(x), dense_rows(residual), weight, eps, gemma)
        ctx.save_for_backward(h, rstd, weight)
        ctx.gemma, ctx.shape = gemma, x.shape
        return y.view(x.shape), h.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, dh: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        h, rstd, weight = ctx.saved_tensors
        weight_grad = ctx.needs_input_grad[2]
        dx, dw = ops.backward(
            dense_rows(dy), h, rstd, weight, dense_rows(dh), ctx.gemma, weight_grad
        )
        dx = dx.view(ctx.shape)
        return dx, dx, dw if weight_grad else None, None, None


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, gemma: bool = False
) -> torch.Tensor:
    """Return w * x / sqrt(mean(x^2) + eps) over the last dimension, computed in fp32.

    Args:
        x: [..., D], any strides.
        weight: [D].
        eps: Added to the mean square.
        gemma: Multiply by 1 + w before rounding, as Gemma does. Otherwise the quotient is rounded
            to the dtype of x first and the result has the promoted dtype, as Llama's.

    Raises:
        KernelArgumentError: A shape, dtype or device does not fit.

    Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4. The gradient of x is
    rstd * (w dy - x_hat * mean(w dy * x_hat)); that of a frozen weight is not computed.
    """
    _check("rms_norm", x, weight)
    y: torch.Tensor = apply(_RmsNorm, x, weight, eps, gemma)
    return y


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    gemma: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``rms_norm`` of h = x + residual, and h; both have the shape of x and residual.

    Raises:
        KernelArgumentError: A shape, dtype or device does not fit.
    """
    _check("add_rms_norm", x, weight)
    check_shape("add_rms_norm", "residual", residual, x.shape)
    check_dtype("add_rms_norm", "residual", residual, (x.dtype,))
    check_device("add_rms_norm", x=x, residual=residual)
    y, h = apply(_AddRmsNorm, x, residual, weight, eps, gemma)
    return y, h


def _check(op: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    check_dtype(op, "x", x, FLOATS)
    check_dtype(op, "weight", weight, FLOATS)
    check_shape(op, "weight", weight, x.shape[-1:])
    check_device(op, x=x, weight=weight)
