"""The DoRA ops in plain PyTorch.

Size legend: T tokens, K features in, O features out, R rank.
"""

from __future__ import annotations

import torch


def norm(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the norm of each row of W + scale * B A [O], fp32 (fp64 for fp64).

    Args:
        weight: [O, K].
        a: [R, K].
        b: [O, R].
        scale: Of the adapter.
    """
    dtype = _wide(weight)
    whole = weight.to(dtype) + scale * (b.to(dtype) @ a.to(dtype))
    row_norm: torch.Tensor = torch.linalg.vector_norm(whole, dim=1)
    return row_norm


def scaled(
    y0: torch.Tensor,
    p: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    gain: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Return y = gain * (y0 + scale * P B^T) + bias [T, O], the type of y0.

    Args:
        y0: Base output [T, O], without bias.
        p: drop(x) A^T [T, R].
        b: [O, R].
        scale: Of the adapter.
        gain: Magnitude over norm [O].
        bias: [O] or None.
    """
    y = _whole(y0, p, b, scale) * gain.to(_wide(y0))
    return (y if bias is None else y + bias.to(y.dtype)).to(y0.dtype)


def scaled_backward(
    dy: torch.Tensor,
    y0: torch.Tensor,
    p: torch.Tensor | None,
    b: torch.Tensor | None,
    scale: float,
    gain: torch.Tensor,
    norm: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return dv = gain * dy [T, O], and dm [O] = sum over tokens of dy * v / norm.

    v is y0 + scale * P B^T, or y0 where there is no P: then y0 may be y without bias, which is
    gain * v, and ``norm`` the magnitude, which is gain * norm. dm is fp32 (fp64 for fp64).
    """
    wide = dy.to(_wide(y0))
    v = y0.to(wide.dtype) if p is None or b is None else _whole(y0, p, b, scale)
    dm = (wide * v).sum(0) / norm
    return (wide * gain.to(wide.dtype)).to(y0.dtype), dm


def plain_norm(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    """Norm as PEFT computes it: B A is formed, by the dtype of the weight."""
    product = b.to(weight.dtype) @ a.to(weight.dtype)
    dtype = _wide(weight)
    row_norm: torch.Tensor = torch.linalg.norm(weight + scale * product, dim=1)
    return row_norm.to(dtype)


def plain_scaled(
    y0: torch.Tensor,
    p: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    gain: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Output as PEFT computes it: what DoRA changes is added to the base layer's output."""
    base = y0 if bias is None else y0 + bias.to(y0.dtype)
    factor = gain.to(y0.dtype)
    lora = p.to(y0.dtype) @ b.to(y0.dtype).t()
    return base + ((factor - 1) * y0 + factor * lora * scale)


def plain_scaled_backward(
    dy: torch.Tensor,
    y0: torch.Tensor,
    p: torch.Tensor | None,
    b: torch.Tensor | None,
    scale: float,
    gain: torch.Tensor,
    norm: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients as autograd computes them for PEFT's forward."""
    dgain = (dy * y0).sum(0)
    if p is not None and b is not None:
        lora = p.to(y0.dtype) @ b.to(y0.dtype).t()
        dgain = dgain + (dy * lora * scale).sum(0)
    return dy * gain.to(y0.dtype), dgain.to(norm.dtype) / norm


def _whole(y0: torch.Tensor, p: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    dtype = _wide(y0)
    return y0.to(dtype) + scale * (p.to(dtype) @ b.to(dtype).t())


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
