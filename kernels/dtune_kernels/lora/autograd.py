"""Linears and gated MLPs with low-rank adapters, with their gradients.

What is kept for the backward: x, or h and 1 / rms(h) where a norm is folded in; P [T, sum of R];
of an MLP also the base outputs of gate and up. Masks, x behind a norm and what is between gate, up
and down are computed again.

Size legend: T tokens, K features in, O features out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from dtune_kernels.checks import check
from dtune_kernels.glu.reference import ACTIVATIONS
from dtune_kernels.layout import dense_rows
from dtune_kernels.library import apply
from dtune_kernels.lora import ops
from dtune_kernels.lora.group import Group, Member, flatten, group_of, size_of
from dtune_kernels.lora.types import Linear, Norm, check_input, check_linear, shape_of
from dtune_kernels.rms_norm import ops as rms_norm

FIRST_FLAT = 4
"""Arguments before the flat tensors: the plan, x, the norm's weight, the seeds."""


@dataclass(frozen=True)
class Plan:
    """What of a call is no tensor."""

    members: tuple[Member, ...]
    dtype: torch.dtype
    """Of the products: that of x behind the norm."""
    eps: float
    gemma: bool
    activation: str


class _LoraLinears(Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        h: torch.Tensor,
        norm_weight: torch.Tensor | None,
        seed: torch.Tensor | None,
        *flat: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        group = group_of(plan.members, flat)
        rows = dense_rows(h)
        x, rstd = _normed(rows, norm_weight, plan)
        ys, p = group.forward(x, seed)
        _save(ctx, plan, h, rows, rstd, norm_weight, seed, (p,), flat, group)
        return tuple(y.view(*h.shape[:-1], y.shape[1]) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, rstd, norm_weight, seed, p, *flat = ctx.saved_tensors
        group = group_of(ctx.plan.members, flat)
        upstream = [dense_rows(dy) for dy in dys]
        ds, db = group.low_rank_grads(upstream, p)
        da = _grad_a(ctx, group, rows, ds, seed, rstd, norm_weight)
        grads: list[torch.Tensor | None] = [None] * len(flat)
        group.fill(grads, ctx.needs_input_grad[FIRST_FLAT:], upstream, da, db)
        dh, dw = None, None
        if any(ctx.needs_input_grad[1:3]):
            dh, dw = _norm_backward(ctx, group.dx(upstream, ds, seed), rows, rstd, norm_weight)
        return None, dh, dw, None, *grads


class _LoraMlp(Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        h: torch.Tensor,
        norm_weight: torch.Tensor | None,
        seed: torch.Tensor | None,
        *flat: torch.Tensor | None,
    ) -> torch.Tensor:
        first, last = _gate_up_and_down(plan, flat)
        rows = dense_rows(h)
        x, rstd = _normed(rows, norm_weight, plan)
        seeds = _seeds(seed)
        gate, up = first.base(x)
        p = first.project(x, seeds[0])
        inner = ops.glu(gate, up, p, first.b, first.owner, first.scale, plan.activation)
        (y,), p_down = last.forward(inner, seeds[1])
        kept = (p, p_down, gate, up)
        _save(ctx, plan, h, rows, rstd, norm_weight, seed, kept, flat, first)
        out: torch.Tensor = y.view(*h.shape[:-1], y.shape[1])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, rstd, norm_weight, seed, p, p_down, gate, up, *flat = ctx.saved_tensors
        first, last = _gate_up_and_down(ctx.plan, flat)
        seeds = _seeds(seed)
        upstream = [dense_rows(dy)]
        ds_down, db_down = last.low_rank_grads(upstream, p_down)
        dgate, dup, inner = ops.glu_backward(
            last.base_dx(upstream),
            gate,
            up,
            p,
            first.b,
            first.owner,
            first.scale,
            ds_down,
            last.a,
            seeds[1],
            last.dropout,
            ctx.plan.activation,
        )
        da_down = _grad_a(ctx, last, inner, ds_down, seeds[1], None, None)
        del inner
        between = [dgate, dup]
        ds, db = first.low_rank_grads(between, p)
        da = _grad_a(ctx, first, rows, ds, seeds[0], rstd, norm_weight)
        grads: list[torch.Tensor | None] = [None] * len(flat)
        needed = ctx.needs_input_grad[FIRST_FLAT:]
        last.fill(grads, needed, upstream, da_down, db_down)
        first.fill(grads, needed, between, da, db)
        dh, dw = None, None
        if any(ctx.needs_input_grad[1:3]):
            dx = first.dx(between, ds, seeds[0])
            dh, dw = _norm_backward(ctx, dx, rows, rstd, norm_weight)
        return None, dh, dw, None, *grads


def lora_linear(x: torch.Tensor, linear: Linear, *, norm: Norm | None = None) -> torch.Tensor:
    """Return ``lora_linears`` of one linear."""
    return lora_linears(x, (linear,), norm=norm)[0]


def lora_linears(
    x: torch.Tensor, linears: Sequence[Linear], *, norm: Norm | None = None
) -> tuple[torch.Tensor, ...]:
    """Return x W^T + bias + sum of scale * (drop(x) A^T) B^T for linears that read one x.

    The products have the dtype of autocast where it is on, else that of x; P = drop(x) A^T is kept
    in fp32, the scale is applied in fp32, and the sum is rounded once. Every adapter has a mask of
    its own. With ``norm`` what comes in is h, and x is its RMSNorm.

    Args:
        x: [..., K], any strides.
        linears: With weights [O, K], O of each its own.
        norm: The RMSNorm before them, if it is to be computed here.

    Returns:
        Of each linear y [..., O], in the dtype of the products.

    Raises:
        KernelArgumentError: A shape, dtype or device does not fit, or a base weight is trained.

    LoRA, Hu et al. 2021, arXiv:2106.09685, eq. 3. With dS = s dy B the gradients are
    dA = dS^T drop(x), dB = s dy^T P and dx = dy W + drop(dS A).
    """
    op = "lora_linears"
    check(len(linears) > 0, op, "linears", got="none", wanted="at least one")
    check_input(op, x, norm)
    for index, linear in enumerate(linears):
        check_linear(op, f"linears[{index}]", linear, inputs=x.shape[-1], x=x)
    seed = _draw_seeds(x, [linears])
    ys: tuple[torch.Tensor, ...] = _apply(_LoraLinears, x, linears, norm, seed, "")
    return ys


def lora_mlp(
    x: torch.Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
    *,
    activation: str,
    norm: Norm | None = None,
) -> torch.Tensor:
    """Return down(act(gate(x)) * up(x)), each linear as ``lora_linears`` computes it.

    Args:
        x: [..., K], any strides.
        gate: [F, K].
        up: [F, K].
        down: [O, F].
        activation: ``silu``, ``gelu`` or ``gelu_tanh``.
        norm: The RMSNorm before gate and up, if it is to be computed here.

    Returns:
        y [..., O], in the dtype of the products.

    Raises:
        KernelArgumentError: As ``lora_linears``; or the activation is not known.

    Shazeer 2020, arXiv:2002.05202, eq. 6.
    """
    op = "lora_mlp"
    check(activation in ACTIVATIONS, op, "activation", got=activation, wanted=ACTIVATIONS)
    check_input(op, x, norm)
    check_linear(op, "gate", gate, inputs=x.shape[-1], x=x)
    check_linear(op, "up", up, inputs=x.shape[-1], x=x)
    features, other = shape_of(gate.weight)[0], shape_of(up.weight)[0]
    check(features == other, op, "features of up", got=other, wanted=f"{features}, those of gate")
    check_linear(op, "down", down, inputs=features, x=x)
    seed = _draw_seeds(x, [(gate, up), (down,)])
    y: torch.Tensor = _apply(_LoraMlp, x, (gate, up, down), norm, seed, activation)
    return y


def _apply(
    function: type[Function],
    x: torch.Tensor,
    linears: Sequence[Linear],
    norm: Norm | None,
    seed: torch.Tensor | None,
    activation: str,
) -> Any:
    dtype = _product_dtype(x)
    flat, members = flatten(linears)
    if norm is None:
        plan = Plan(members, dtype, 0.0, False, activation)
        return apply(function, plan, x.to(dtype), None, seed, *flat)
    plan = Plan(members, dtype, norm.eps, norm.gemma, activation)
    return apply(function, plan, x, norm.weight, seed, *flat)


def _product_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of a Linear's products: that of autocast, which leaves fp64 alone."""
    device = x.device.type
    available = torch.amp.is_autocast_available(device)
    if x.dtype != torch.float64 and available and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _draw_seeds(x: torch.Tensor, groups: Sequence[Sequence[Linear]]) -> torch.Tensor | None:
    """Return a seed for each group, int64; None where nothing is dropped.

    Drawn where x is, from the generator whose state checkpointing restores.
    """
    if not any(each.dropout for group in groups for one in group for each in one.adapters):
        return None
    return torch.randint(0, 2**63 - 1, (len(groups),), dtype=torch.int64, device=x.device)


def _seeds(seed: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if seed is None else (seed[:1], seed[1:])


def _gate_up_and_down(plan: Plan, flat: Sequence[torch.Tensor | None]) -> tuple[Group, Group]:
    before = size_of(plan.members[:2])
    return group_of(plan.members[:2], flat), group_of(plan.members[2:], flat, before)


def _normed(
    h: torch.Tensor, weight: torch.Tensor | None, plan: Plan
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return x [T, K] in the dtype of the products, and 1 / rms(h) where there is a norm."""
    if weight is None:
        return h, None
    x, rstd = rms_norm.forward(h, weight, plan.eps, plan.gemma)
    return x.to(plan.dtype), rstd


def _save(
    ctx: Any,
    plan: Plan,
    h: torch.Tensor,
    rows: torch.Tensor,
    rstd: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    seed: torch.Tensor | None,
    kept: Sequence[torch.Tensor | None],
    flat: Sequence[torch.Tensor | None],
    group: Group,
) -> None:
    """Keep what the backward reads; h only for the norm's gradient and for those of A."""
    normed = norm_weight is not None and any(ctx.needs_input_grad[1:3])
    wanted = normed or _trains_a(ctx, group)
    ctx.plan, ctx.shape = plan, h.shape
    ctx.save_for_backward(rows if wanted else None, rstd, norm_weight, seed, *kept, *flat)


def _trains_a(ctx: Any, group: Group) -> bool:
    return any(ctx.needs_input_grad[FIRST_FLAT + at] for at in group.a_at)


def _grad_a(
    ctx: Any,
    group: Group,
    rows: torch.Tensor,
    ds: torch.Tensor | None,
    seed: torch.Tensor | None,
    rstd: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
) -> Sequence[torch.Tensor | None]:
    """Return dA of each adapter; of h where a norm is folded in."""
    if ds is None or not _trains_a(ctx, group):
        return [None] * len(group.a)
    plan = ctx.plan
    if norm_weight is not None and rows.dtype != plan.dtype:
        # The kernel forms x in the dtype of h.
        rows, _ = _normed(rows, norm_weight, plan)
        rstd = norm_weight = None
    da: list[torch.Tensor] = ops.grad_a(
        rows, ds, group.a, seed, group.dropout, rstd, norm_weight, plan.gemma
    )
    return da


def _norm_backward(
    ctx: Any,
    dx: torch.Tensor,
    rows: torch.Tensor,
    rstd: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of what came in and of the norm's weight."""
    if weight is None or rstd is None:
        return dx.view(ctx.shape), None
    trained = ctx.needs_input_grad[2]
    dh, dw = rms_norm.backward(dx, rows, rstd, weight, None, ctx.plan.gemma, trained)
    return dh.view(ctx.shape), dw if trained else None
