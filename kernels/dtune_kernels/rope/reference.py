"""Rotary position embedding in plain PyTorch.

Shape legend: B batch, H query heads, G key heads, S positions, D features of a head, R of them
rotated (the first ones). q [B, H, S, D], k [B, G, S, D], cos and sin [B or 1, S, R].
"""

from __future__ import annotations

import torch


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transpose: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q and k rotated, or times the transposed matrix; in the memory order they came in."""
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    for x, y in ((q, q_out), (k, k_out)):
        _rotate(x, y, cos, sin, transpose)
        y[..., cos.shape[-1] :].copy_(x[..., cos.shape[-1] :])
    return q_out, k_out


def rope_(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transpose: bool
) -> None:
    """Overwrite q and k with what ``rope`` returns."""
    _rotate(q, q, cos, sin, transpose)
    _rotate(k, k, cos, sin, transpose)


def plain_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transpose: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """``apply_rotary_pos_emb`` as Hugging Face's models write it, and what autograd makes of it."""
    size = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    out = []
    for x in (q, k):
        turned = x[..., :size]
        if transpose:
            y = turned * cos - _rotate_half(turned * sin)
        else:
            y = turned * cos + _rotate_half(turned) * sin
        y = y.to(x.dtype)
        out.append(y if size == x.shape[-1] else torch.cat((y, x[..., size:]), dim=-1))
    return out[0], out[1]


def plain_rope_(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transpose: bool
) -> None:
    """``plain_rope``, written back: no plain model rotates in place."""
    q_out, k_out = plain_rope(q, k, cos, sin, transpose)
    q.copy_(q_out)
    k.copy_(k_out)


def _rotate(
    x: torch.Tensor, y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transpose: bool
) -> None:
    """Write the first R features of y; y may be x."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    half = cos.shape[-1] // 2
    a, b = x[..., :half].to(dtype), x[..., half : 2 * half].to(dtype)
    cos_a, cos_b = cos.to(dtype).unsqueeze(1).split(half, dim=-1)
    sin_a, sin_b = sin.to(dtype).unsqueeze(1).split(half, dim=-1)
    if transpose:
        first, second = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        first, second = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    y[..., :half].copy_(first)
    y[..., half : 2 * half].copy_(second)


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)
