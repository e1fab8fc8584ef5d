"""AdamW over a flat buffer in plain PyTorch.

Shape legend: every buffer is [n]; ``lr``, ``step``, ``blocked`` and ``clip_scale`` hold one number.
"""

from __future__ import annotations

import math

import torch
from torch.optim.adamw import adamw

CHUNK = 1 << 16
"""Elements that are updated at a time: a few of these, and not of n, are computed on the way."""


def adamw_flat_(
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
    """Update master, both averages and the shadow; computed in the dtype of ``master``.

    The averages move by a share of their distance, and the corrections of their bias are
    computed in fp64: in fp32, beta2 and beta2^step near 1 would cost 5 digits of 1 - beta2^step.
    """
    if blocked is not None and bool(blocked):
        return
    corrections = [-torch.expm1(step.double() * log(beta)) for beta in (beta1, beta2)]
    root = corrections[1].sqrt().to(master.dtype)
    rate = lr.to(master.dtype)
    decay, scale = rate * weight_decay, rate / corrections[0].to(master.dtype)
    buffers = (master, grad, exp_avg, exp_avg_sq)
    for p, g, m, v in zip(*(buffer.split(CHUNK) for buffer in buffers), strict=True):
        g = g.to(p.dtype)
        if clip_scale is not None:
            g = g * clip_scale.to(p.dtype)
        m.lerp_(g, 1 - beta1)
        v.lerp_(g.square(), 1 - beta2)
        change = scale * (m / (v.sqrt() / root + eps))
        p.sub_(decay * p + change)
    if shadow is not None:
        shadow.copy_(master)


def log(beta: float) -> float:
    """Logarithm of a decay, whose power at a step is ``exp(step * log)``; minus infinity at 0."""
    return math.log(beta) if beta > 0 else -math.inf


def plain_adamw_flat_(
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
    """Clipping, ``torch.optim.AdamW(fused=True)`` and the copy to the low precision, in turn."""
    grad = grad.to(master.dtype)
    if clip_scale is not None:
        grad = grad * clip_scale
    adamw(
        [master],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [step.float() - 1],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
        found_inf=blocked,
    )
    if shadow is not None:
        shadow.copy_(master)
