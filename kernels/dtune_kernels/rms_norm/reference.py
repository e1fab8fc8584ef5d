"""RMSNorm in plain PyTorch.

Shape legend: N rows, D features.
"""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, gemma: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y [N, D] and 1 / rms(x) [N], fp32 (fp64 for fp64)."""
    wide = x.to(_wide(x))
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    return _scaled(wide * rstd[:, None], x, weight, gemma=gemma), rstd


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, gemma: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y, h = x + residual, both [N, D], and 1 / rms(h) [N]."""
    h = x + residual
    y, rstd = rms_norm(h, weight, eps, gemma)
    return y, h, rstd


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    dh: torch.Tensor | None,
    gemma: bool,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dx [N, D], with ``dh`` added to it, and dw [D], or empty where it is not wanted."""
    dtype = _wide(x)
    normed = x.to(dtype) * rstd[:, None]
    upstream = dy.to(dtype)
    scaled = upstream * (weight.to(dtype) + float(gemma))
    mean = (scaled * normed).mean(-1, keepdim=True)
    dx = (scaled - normed * mean) * rstd[:, None]
    if dh is not None:
        dx = dx + dh.to(dtype)
    dw = (upstream * normed).sum(0) if weight_grad else normed.new_empty(0)
    return dx.to(x.dtype), dw.to(weight.dtype)


def plain_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, gemma: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm as Hugging Face's modules write it."""
    wide = x.to(_wide(x))
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = wide * rstd
    if gemma:
        return (normed * (1.0 + weight.to(wide.dtype))).to(x.dtype), rstd[:, 0]
    return weight * normed.to(x.dtype), rstd[:, 0]


def _scaled(
    normed: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *, gemma: bool
) -> torch.Tensor:
    """Gemma multiplies by 1 + w before it rounds; Llama rounds, then multiplies by w."""
    if gemma:
        return (normed * (1.0 + weight.to(normed.dtype))).to(x.dtype)
    return weight * normed.to(x.dtype)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
