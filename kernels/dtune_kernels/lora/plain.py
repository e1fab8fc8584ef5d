"""The LoRA ops as a model with PEFT runs them under autocast, with its rounding.

The arguments are those of ``reference``. Dropout draws a mask of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dtune_kernels.glu.reference import plain_glu
from dtune_kernels.lora.reference import normed


def project(
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    seed: torch.Tensor | None,
    dropout: Sequence[float],
) -> torch.Tensor:
    """``lora_A(dropout(x))`` of each adapter, as PEFT runs it under autocast."""
    parts = [
        F.linear(F.dropout(x, rate), each.to(x.dtype))
        for each, rate in zip(a, dropout, strict=True)
    ]
    return torch.cat(parts, dim=1)


def expand_(
    y: Sequence[torch.Tensor],
    p: torch.Tensor,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
    seed: torch.Tensor | None,
    dropout: Sequence[float],
) -> None:
    """``result + lora_B(...) * scaling``, as PEFT runs it under autocast."""
    for j, part in enumerate(p.split([each.shape[1] for each in b], dim=1)):
        own = y[member[j]]
        added = F.linear(part.to(own.dtype), b[j].to(own.dtype))
        own.copy_(own + F.dropout(added, dropout[j]) * scale[j])


def expand(
    y: Sequence[torch.Tensor],
    p: torch.Tensor,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
) -> list[torch.Tensor]:
    """``result + lora_B(...) * scaling``, as PEFT runs it under autocast."""
    out = [each.clone() for each in y]
    expand_(out, p, b, member, scale, None, [0.0] * len(b))
    return out


def grad_b(
    dy: Sequence[torch.Tensor],
    p: torch.Tensor,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Gradients of ``lora_B`` as autograd runs them under autocast."""
    ds, db = [], []
    for j, part in enumerate(p.split([each.shape[1] for each in b], dim=1)):
        scaled = dy[member[j]] * scale[j]
        ds.append(scaled @ b[j].to(scaled.dtype))
        db.append((scaled.t() @ part.to(scaled.dtype)).to(b[j].dtype))
    return torch.cat(ds, dim=1), db


def grad_a(
    x: torch.Tensor,
    ds: torch.Tensor,
    a: Sequence[torch.Tensor],
    seed: torch.Tensor | None,
    dropout: Sequence[float],
    rstd: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    gemma: bool,
) -> list[torch.Tensor]:
    """Gradients of ``lora_A`` as autograd runs them under autocast."""
    if rstd is not None and norm_weight is not None:
        x = normed(x, rstd, norm_weight, gemma=gemma)
    return [
        (part.to(x.dtype).t() @ F.dropout(x, dropout[j])).to(a[j].dtype)
        for j, part in enumerate(ds.split([each.shape[0] for each in a], dim=1))
    ]


def glu(
    gate: torch.Tensor,
    up: torch.Tensor,
    p: torch.Tensor | None,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
    activation: str,
) -> torch.Tensor:
    """``act_fn(gate_proj(x)) * up_proj(x)`` from the base outputs on."""
    whole = [gate.clone(), up.clone()]
    if p is not None:
        expand_(whole, p, b, member, scale, None, [0.0] * len(b))
    return plain_glu(whole[0], whole[1], activation)


def glu_backward(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    p: torch.Tensor | None,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
    ds: torch.Tensor | None,
    a: Sequence[torch.Tensor],
    seed: torch.Tensor | None,
    dropout: Sequence[float],
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Autograd's backward of ``glu``, after that of the adapters of the layer after it."""
    dh = dh.clone()
    if ds is not None:
        transposed, ones = [each.t() for each in a], [1.0] * len(a)
        expand_([dh], ds, transposed, [0] * len(a), ones, None, dropout)
    whole = [gate.clone(), up.clone()]
    if p is not None:
        expand_(whole, p, b, member, scale, None, [0.0] * len(b))
    leaves = [each.detach().requires_grad_() for each in whole]
    with torch.enable_grad():
        h = plain_glu(leaves[0], leaves[1], activation)
        dgate, dup = torch.autograd.grad(h, leaves, dh)
    return dgate, dup, h.detach()
