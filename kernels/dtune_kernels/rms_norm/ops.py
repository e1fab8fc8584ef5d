"""The RMSNorm ops: schemas, fakes, costs."""

from __future__ import annotations

import torch

from dtune_kernels.library import Cost, Shape, define, nbytes
from dtune_kernels.rms_norm import reference

EPS = 1e-6
SOURCE = "Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4; Hugging Face LlamaRMSNorm, GemmaRMSNorm"


def _forward_fake(
    x: torch.Tensor, weight: torch.Tensor, eps: float, gemma: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = x.dtype if gemma else torch.promote_types(x.dtype, weight.dtype)
    return x.new_empty(x.shape, dtype=dtype), _rstd_fake(x)


def _add_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, gemma: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, rstd = _forward_fake(x, weight, eps, gemma)
    return y, x.new_empty(x.shape), rstd


def _backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    dh: torch.Tensor | None,
    gemma: bool,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dw = weight.new_empty(weight.shape if weight_grad else 0)
    return x.new_empty(x.shape), dw


def _rstd_fake(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


def _forward_cost(x: torch.Tensor, weight: torch.Tensor, eps: float, gemma: bool) -> Cost:
    rows = x.shape[0]
    return Cost(
        flops=5 * x.numel(),
        read=nbytes(x, weight),
        written=nbytes(x) + 4 * rows,
        # x and 1 / rms; y is the next layer's to keep.
        saved=nbytes(x) + 4 * rows,
    )


def _add_cost(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, gemma: bool
) -> Cost:
    alone = _forward_cost(x, weight, eps, gemma)
    return Cost(
        flops=alone.flops + x.numel(),
        read=alone.read + nbytes(residual),
        written=alone.written + nbytes(x),
        saved=alone.saved,
    )


def _backward_cost(
    dy: torch.Tensor,
    x: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
    dh: torch.Tensor | None,
    gemma: bool,
    weight_grad: bool,
) -> Cost:
    return Cost(
        flops=(10 if weight_grad else 8) * x.numel(),
        read=nbytes(dy, x, rstd, weight, dh),
        written=nbytes(x) + (nbytes(weight) if weight_grad else 0),
    )


def _random(
    shape: Shape, dtype: torch.dtype, device: torch.device, count: int
) -> list[torch.Tensor]:
    size = (shape.tokens, shape.hidden)
    return [torch.randn(size, dtype=dtype, device=device) for _ in range(count)]


def _weight(shape: Shape, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return 1 + 0.1 * torch.randn(shape.hidden, dtype=dtype, device=device)


def _forward_arguments(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, float, bool]:
    (x,) = _random(shape, dtype, device, 1)
    return x, _weight(shape, dtype, device), EPS, False


def _add_arguments(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, bool]:
    x, residual = _random(shape, dtype, device, 2)
    return x, residual, _weight(shape, dtype, device), EPS, False


def _backward_arguments(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, bool, bool]:
    dy, x, dh = _random(shape, dtype, device, 3)
    rstd = torch.rsqrt(x.to(torch.promote_types(dtype, torch.float32)).square().mean(-1) + EPS)
    return dy, x, rstd, _weight(shape, dtype, device), dh, False, False


forward = define(
    "rms_norm(Tensor x, Tensor weight, float eps, bool gemma) -> (Tensor, Tensor)",
    reference=reference.rms_norm,
    plain=reference.plain_rms_norm,
    triton="dtune_kernels.rms_norm.triton:rms_norm",
    fake=_forward_fake,
    cost=_forward_cost,
    arguments=_forward_arguments,
    source=SOURCE,
)
add_forward = define(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, bool gemma)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.add_rms_norm,
    triton="dtune_kernels.rms_norm.triton:add_rms_norm",
    fake=_add_fake,
    cost=_add_cost,
    arguments=_add_arguments,
    source=SOURCE,
)
backward = define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor rstd, Tensor weight, Tensor? dh, bool gemma,"
    " bool weight_grad) -> (Tensor, Tensor)",
    reference=reference.rms_norm_backward,
    triton="dtune_kernels.rms_norm.triton:rms_norm_backward",
    fake=_backward_fake,
    cost=_backward_cost,
    arguments=_backward_arguments,
    source=SOURCE,
)
