"""The LoRA ops in plain PyTorch.

Size legend: T tokens, K features in, N features out, R rank, F features of a gated unit.
Adapters of a group lie side by side in P and dS [T, sum of R], in the order of the lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dtune_kernels.glu import reference as glu_reference
from dtune_kernels.lora.dropout import keep_scale, kept


def project(
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    seed: torch.Tensor | None,
    dropout: Sequence[float],
) -> torch.Tensor:
    """Return P [T, sum of R], fp32 (fp64 for fp64): of each adapter drop(x) A^T.

    Args:
        x: [T, K].
        a: Of each adapter [R, K].
        seed: int64 [1]; not read where nothing is dropped.
        dropout: Of each adapter the probability that an element of x is dropped.
    """
    wide = x.to(_wide(x))
    parts = [
        _dropped(wide, seed, j, rate) @ each.to(wide.dtype).t()
        for j, (each, rate) in enumerate(zip(a, dropout, strict=True))
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
    """Add scale * drop(P B^T) of each adapter to its y, in place.

    Args:
        y: Matrices [T, N], N of each its own.
        p: [T, sum of R].
        b: Of each adapter [N, R], any strides.
        member: Of each adapter the index of its y; never falls.
        scale: Of each adapter.
        seed: As ``project`` takes it.
        dropout: Of each adapter; the mask is that of ``project`` for an x of y's shape.
    """
    for index, each in enumerate(y):
        each.copy_(_with_adapters(each, index, p, b, member, scale, seed, dropout))


def expand(
    y: Sequence[torch.Tensor],
    p: torch.Tensor,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
) -> list[torch.Tensor]:
    """Return what ``expand_`` makes of the y, without dropout, in tensors of their own.

    A forward that wrote over its base products would spoil those that selective recomputation
    keeps; the bytes that are read and written are the same.
    """
    none = [0.0] * len(b)
    return [
        _with_adapters(each, index, p, b, member, scale, None, none).to(each.dtype).contiguous()
        for index, each in enumerate(y)
    ]


def grad_b(
    dy: Sequence[torch.Tensor],
    p: torch.Tensor,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return dS [T, sum of R], the type of P, and of each adapter dB [N, R], the type of B.

    dS = scale * dy B and dB = scale * dy^T P.

    Args:
        dy: Matrices [T, N], N of each its own.
        p: [T, sum of R].
        b: Of each adapter [N, R].
        member: Of each adapter the index of its dy; never falls.
        scale: Of each adapter.
    """
    ds, db = [], []
    for j, part in enumerate(_columns(p, [each.shape[1] for each in b])):
        wide = dy[member[j]].to(p.dtype)
        ds.append(scale[j] * (wide @ b[j].to(p.dtype)))
        db.append((scale[j] * (wide.t() @ part)).to(b[j].dtype))
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
    """Return of each adapter dA = dS^T drop(x) [R, K], the type of A.

    Args:
        x: [T, K]; h, of which x is the RMSNorm, where ``rstd`` is given.
        ds: [T, sum of R].
        a: Of each adapter [R, K]; only shape and type matter.
        seed: As ``project`` takes it.
        dropout: Of each adapter.
        rstd: [T].
        norm_weight: [K].
        gemma: See ``rms_norm``.
    """
    if rstd is not None and norm_weight is not None:
        x = normed(x, rstd, norm_weight, gemma=gemma)
    wide = x.to(ds.dtype)
    return [
        (part.t() @ _dropped(wide, seed, j, dropout[j])).to(a[j].dtype)
        for j, part in enumerate(_columns(ds, [each.shape[0] for each in a]))
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
    """Return act(gate + its adapters) * (up + its adapters) [T, F].

    Args:
        gate: Base output [T, F].
        up: Base output [T, F].
        p: [T, sum of R]; not read without adapters.
        b: Of each adapter [F, R].
        member: Of each adapter 0 for gate or 1 for up; never falls.
        scale: Of each adapter.
        activation: ``silu``, ``gelu`` or ``gelu_tanh``.
    """
    whole, other = _summed(gate, up, p, b, member, scale)
    return glu_reference.glu(whole, other, activation).to(gate.dtype)


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
    """Return the gradients of gate and of up, and ``glu`` itself, all [T, F].

    Args:
        dh: [T, F], without what the adapters of the layer after add to it.
        gate: See ``glu``.
        up: See ``glu``.
        p: See ``glu``.
        b: See ``glu``.
        member: See ``glu``.
        scale: See ``glu``.
        ds: dS [T, sum of R] of the layer after; not read without adapters.
        a: Of each adapter of the layer after [R, F]: drop(dS A) is added to dh.
        seed: Of that layer's ``project``.
        dropout: Of each adapter of that layer.
        activation: See ``glu``.
    """
    whole, other = _summed(gate, up, p, b, member, scale)
    upstream = dh.to(whole.dtype)
    if ds is not None:
        transposed, ones = [each.t() for each in a], [1.0] * len(a)
        upstream = _with_adapters(upstream, 0, ds, transposed, [0] * len(a), ones, seed, dropout)
    dgate, dup, h = glu_reference.glu_backward(upstream, whole, other, activation, True)
    return dgate.to(gate.dtype), dup.to(gate.dtype), h.to(gate.dtype)


def normed(
    h: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor, *, gemma: bool
) -> torch.Tensor:
    """Return x [T, K] of h and 1 / rms(h) [T], rounded as ``rms_norm`` rounds it, in h's type."""
    quotient = h.to(rstd.dtype) * rstd[:, None]
    if gemma:
        return (quotient * (1.0 + weight.to(quotient.dtype))).to(h.dtype)
    return (weight * quotient.to(h.dtype)).to(h.dtype)


def _with_adapters(
    y: torch.Tensor,
    index: int,
    p: torch.Tensor,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
    seed: torch.Tensor | None,
    dropout: Sequence[float],
) -> torch.Tensor:
    """Return y with its adapters added, in the type of P."""
    total = y.to(p.dtype)
    for j, part in enumerate(_columns(p, [each.shape[1] for each in b])):
        if member[j] == index:
            added = scale[j] * (part @ b[j].to(p.dtype).t())
            total = total + _dropped(added, seed, j, dropout[j])
    return total


def _summed(
    gate: torch.Tensor,
    up: torch.Tensor,
    p: torch.Tensor | None,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    if p is None:
        return gate.to(_wide(gate)), up.to(_wide(up))
    rates = [0.0] * len(b)
    return (
        _with_adapters(gate, 0, p, b, member, scale, None, rates),
        _with_adapters(up, 1, p, b, member, scale, None, rates),
    )


def _dropped(x: torch.Tensor, seed: torch.Tensor | None, adapter: int, rate: float) -> torch.Tensor:
    if rate == 0:
        return x
    assert seed is not None
    return torch.where(kept(seed, adapter, x.shape[0], x.shape[1], rate), x, 0) * keep_scale(rate)


def _columns(p: torch.Tensor, ranks: Sequence[int]) -> Iterator[torch.Tensor]:
    yield from p.split(list(ranks), dim=1)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
