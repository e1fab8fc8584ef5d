"""The AdamW op: schema, fake, cost."""

from __future__ import annotations

import torch

from dtune_kernels.adamw import reference
from dtune_kernels.library import Cost, Shape, define, nbytes

Arguments = tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    torch.Tensor | None,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor | None,
    float,
    float,
    float,
    float,
]


def _fake(
    master: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    shadow: torch.Tensor | None,
    clip_scale: torch.Tensor | None,
    lr: torch.Tensor,
    step: torch.Tensor,
    blocked: torch.Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    return None


def _cost(
    master: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    shadow: torch.Tensor | None,
    clip_scale: torch.Tensor | None,
    lr: torch.Tensor,
    step: torch.Tensor,
    blocked: torch.Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> Cost:
    states = nbytes(master, exp_avg, exp_avg_sq)
    return Cost(
        flops=16 * master.numel(),
        read=states + nbytes(grad, clip_scale, lr, step, blocked),
        written=states + nbytes(shadow),
    )


def _arguments(shape: Shape, dtype: torch.dtype, device: torch.device) -> Arguments:
    """As many parameters as one matrix of the MLP: about those of all adapters of rank 16."""
    size = shape.hidden * shape.ffn
    wide = torch.promote_types(dtype, torch.float32)
    master, grad, exp_avg = (
        scale * torch.randn(size, dtype=wide, device=device) for scale in (1.0, 0.1, 0.01)
    )
    exp_avg_sq = 0.01 * torch.rand(size, dtype=wide, device=device)
    low = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    clip_scale, lr, step, blocked = (
        torch.full((), number, dtype=wide, device=device) for number in (0.5, 1e-3, 7.0, 0.0)
    )
    shadow = master.to(low)
    return (
        master, grad, exp_avg, exp_avg_sq, shadow, clip_scale, lr, step, blocked,
        0.9, 0.999, 1e-8, 0.01,
    )  # fmt: skip


update = define(
    "adamw_flat_(Tensor(a!) master, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq,"
    " Tensor(d!)? shadow, Tensor? clip_scale, Tensor lr, Tensor step, Tensor? blocked,"
    " float beta1, float beta2, float eps, float weight_decay) -> ()",
    reference=reference.adamw_flat_,
    plain=reference.plain_adamw_flat_,
    triton="dtune_kernels.adamw.triton:adamw_flat_",
    fake=_fake,
    cost=_cost,
    arguments=_arguments,
    source="Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2; torch.optim.AdamW",
)
