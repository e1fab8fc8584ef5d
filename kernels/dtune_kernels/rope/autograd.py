"""Rotary position embedding with its gradients, and in place without."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function

from dtune_kernels.checks import FLOATS, check, check_device, check_dtype, check_shape
from dtune_kernels.library import apply
from dtune_kernels.rope import ops


class _Rope(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        transpose: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.transpose = transpose
        out: tuple[torch.Tensor, torch.Tensor] = ops.rotate(
            _dense_features(q), _dense_features(k), cos, sin, transpose
        )
        return out

    @staticmethod
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        dq, dk = apply(_Rope, dq, dk, cos, sin, not ctx.transpose)
        return dq, dk, None, None, None


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q and k with their first R features rotated, computed in fp32 and rounded once.

    With a the first and b the second half of the R features, the halves of the result are
    a cos - b sin and b cos + a sin; features beyond R pass through. The results have the dtypes,
    shapes and memory order of q and k: views of a linear's [B, S, H * D] stay such views.

    Args:
        q: [B, H, S, D], any strides; copied only if its features do not lie beside each other.
        k: [B, G, S, D], likewise.
        cos: [B or 1, S, R], R even and at most D, in q's dtype or fp32. Both halves hold the same
            angles; a scaling of attention is a factor in them.
        sin: Likewise.

    Raises:
        KernelArgumentError: A shape, dtype or device does not fit, or a table wants a gradient.

    Su et al. 2021, arXiv:2104.09864, eq. 34. The gradient is the product with the transposed
    matrix, which is the inverse only where cos^2 + sin^2 = 1.
    """
    _check("rope", q, k, cos, sin)
    q_out, k_out = apply(_Rope, q, k, _dense_features(cos), _dense_features(sin), False)
    return q_out, k_out


def rope_(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Overwrite q and k with what ``rope`` returns, for buffers that nobody else reads.

    Args:
        q: [B, H, S, D]; features beside each other, no element at two places.
        k: [B, G, S, D], likewise; no memory in common with q.
        cos: See ``rope``.
        sin: See ``rope``.

    Raises:
        KernelArgumentError: As ``rope``; or q or k wants a gradient while autograd records, or
            its strides do not fit.
    """
    _check("rope_", q, k, cos, sin)
    for name, x in (("q", q), ("k", k)):
        wants = x.requires_grad and torch.is_grad_enabled()
        check(not wants, "rope_", f"requires_grad of {name}", got=True, wanted=False)
        own = x.stride(-1) == 1 and all(
            size == 1 or stride != 0 for size, stride in zip(x.shape, x.stride(), strict=True)
        )
        check(own, "rope_", f"strides of {name}", got=x.stride(), wanted="none 0, the last 1")
    ops.rotate_(q, k, _dense_features(cos), _dense_features(sin), False)


def _dense_features(x: torch.Tensor) -> torch.Tensor:
    """Return x with its last dimension contiguous; copies only if it must."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(op: str, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    check_dtype(op, "q", q, FLOATS)
    check_dtype(op, "k", k, (q.dtype,))
    check_dtype(op, "cos", cos, (q.dtype, torch.float32))
    check_dtype(op, "sin", sin, (cos.dtype,))
    check(q.dim() == 4, op, "shape of q", got=list(q.shape), wanted="[B, H, S, D]")
    batch, _, positions, features = q.shape
    check_shape(op, "k", k, (batch, None, positions, features))
    rows = 1 if cos.dim() == 3 and cos.shape[0] == 1 else batch
    check_shape(op, "cos", cos, (rows, positions, None))
    check_shape(op, "sin", sin, cos.shape)
    rotated = cos.shape[-1]
    fits = 2 <= rotated <= features and rotated % 2 == 0
    check(fits, op, "last size of cos", got=rotated, wanted=f"an even number of at most {features}")
    for name, x in (("cos", cos), ("sin", sin)):
        wants = x.requires_grad and torch.is_grad_enabled()
        check(not wants, op, f"requires_grad of {name}", got=True, wanted=False)
    check_device(op, q=q, k=k, cos=cos, sin=sin)
