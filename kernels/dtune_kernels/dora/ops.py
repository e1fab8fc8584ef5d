"""The DoRA ops: schemas, fakes, costs."""

from __future__ import annotations

import torch

from dtune_kernels.dora import reference
from dtune_kernels.library import Cost, Shape, define, nbytes

SCALE = 2.0
SOURCE = "DoRA, Liu et al. 2024, arXiv:2402.09353, eq. 5 and sec. 4.3; Hugging Face PEFT 0.21"


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _norm_fake(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float
) -> torch.Tensor:
    return weight.new_empty(weight.shape[0], dtype=_wide(weight))


def _scaled_fake(
    y0: torch.Tensor,
    p: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    gain: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    return y0.new_empty(y0.shape)


def _backward_fake(
    dy: torch.Tensor,
    y0: torch.Tensor,
    p: torch.Tensor | None,
    b: torch.Tensor | None,
    scale: float,
    gain: torch.Tensor,
    norm: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return y0.new_empty(y0.shape), norm.new_empty(norm.shape)


def _norm_cost(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> Cost:
    return Cost(
        flops=(2 * a.shape[0] + 4) * weight.numel(),
        read=nbytes(weight, a, b),
        written=4 * weight.shape[0],
    )


def _scaled_cost(
    y0: torch.Tensor,
    p: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    gain: torch.Tensor,
    bias: torch.Tensor | None,
) -> Cost:
    return Cost(
        flops=(2 * b.shape[1] + 4) * y0.numel(),
        read=nbytes(y0, p, b, gain, bias),
        written=nbytes(y0),
        saved=nbytes(y0, p),
    )


def _backward_cost(
    dy: torch.Tensor,
    y0: torch.Tensor,
    p: torch.Tensor | None,
    b: torch.Tensor | None,
    scale: float,
    gain: torch.Tensor,
    norm: torch.Tensor,
) -> Cost:
    return Cost(
        flops=(5 + (0 if b is None else 2 * b.shape[1])) * y0.numel(),
        read=nbytes(dy, y0, p, b, gain, norm),
        written=nbytes(dy, norm),
    )


def _norm_arguments(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    weight = torch.randn(shape.ffn, shape.hidden, dtype=dtype, device=device)
    # Adapters are trained in fp32.
    a = torch.randn(shape.rank, shape.hidden, dtype=_wide(weight), device=device)
    b = torch.randn(shape.ffn, shape.rank, dtype=_wide(weight), device=device)
    return weight / shape.hidden**0.5, a / shape.hidden**0.5, b / shape.rank**0.5, SCALE


def _scaled_arguments(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor, torch.Tensor | None]:
    y0 = torch.randn(shape.tokens, shape.hidden, dtype=dtype, device=device)
    p = torch.randn(shape.tokens, shape.rank, dtype=_wide(y0), device=device)
    b = torch.randn(shape.hidden, shape.rank, dtype=_wide(y0), device=device)
    gain = 1 + 0.1 * torch.randn(shape.hidden, dtype=_wide(y0), device=device)
    return y0, p, b / shape.rank**0.5, SCALE, gain, None


def _backward_arguments(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    float,
    torch.Tensor,
    torch.Tensor,
]:
    y0, p, b, scale, gain, _ = _scaled_arguments(shape, dtype, device)
    return torch.randn_like(y0), y0, p, b, scale, gain, gain.square() + 1


norm = define(
    "dora_norm(Tensor weight, Tensor a, Tensor b, float scale) -> Tensor",
    reference=reference.norm,
    plain=reference.plain_norm,
    triton="dtune_kernels.dora.triton:norm",
    fake=_norm_fake,
    cost=_norm_cost,
    arguments=_norm_arguments,
    source=SOURCE,
)
scaled = define(
    "dora_scale(Tensor y0, Tensor p, Tensor b, float scale, Tensor gain, Tensor? bias) -> Tensor",
    reference=reference.scaled,
    plain=reference.plain_scaled,
    triton="dtune_kernels.dora.triton:scaled",
    fake=_scaled_fake,
    cost=_scaled_cost,
    arguments=_scaled_arguments,
    source=SOURCE,
)
scaled_backward = define(
    "dora_scale_backward(Tensor dy, Tensor y0, Tensor? p, Tensor? b, float scale, Tensor gain,"
    " Tensor norm) -> (Tensor, Tensor)",
    reference=reference.scaled_backward,
    plain=reference.plain_scaled_backward,
    triton="dtune_kernels.dora.triton:scaled_backward",
    fake=_backward_fake,
    cost=_backward_cost,
    arguments=_backward_arguments,
    source=SOURCE,
)
