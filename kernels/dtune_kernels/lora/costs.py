"""What calls of the LoRA ops move and compute.

Counted in DRAM traffic: arguments and results once for each pass over them, and what programs write
and read of each other's shares (see ``tiles``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dtune_kernels.launch import num_multiprocessors
from dtune_kernels.library import Cost, nbytes
from dtune_kernels.lora.tiles import (
    GRAD_WIDTH,
    PROJECT_WIDTH,
    Piece,
    ceil_div,
    grad_a_tiles,
    grad_b_tiles,
    in_one_pass,
    passes,
    project_tiles,
)

SHARE = 4
"""Bytes of an element of a share: fp32."""


def project(
    x: torch.Tensor, a: Sequence[torch.Tensor], seed: torch.Tensor | None, dropout: Sequence[float]
) -> Cost:
    """P = drop(x) A^T."""
    ranks = [each.shape[0] for each in a]
    count, shares = _project_passes(x, ranks, dropout)
    p = SHARE * x.shape[0] * sum(ranks)
    return Cost(
        flops=2 * x.numel() * sum(ranks),
        read=count * nbytes(x) + nbytes(*a) + shares,
        written=p + shares,
        # x and P.
        saved=nbytes(x) + p,
    )


def expand_(
    y: Sequence[torch.Tensor],
    p: torch.Tensor,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
    seed: torch.Tensor | None,
    dropout: Sequence[float],
) -> Cost:
    """Y += s P B^T."""
    flops = sum(2 * p.shape[0] * each.numel() for each in b) + sum(each.numel() for each in y)
    return Cost(flops=flops, read=nbytes(*y, p, *b), written=nbytes(*y))


def expand(
    y: Sequence[torch.Tensor],
    p: torch.Tensor,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
) -> Cost:
    """Y + s P B^T."""
    return expand_(y, p, b, member, scale, None, [0.0] * len(b))


def grad_b(
    dy: Sequence[torch.Tensor],
    p: torch.Tensor,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
) -> Cost:
    """Gradients dS = s dy B and dB = s dy^T P."""
    ranks = [each.shape[1] for each in b]
    together = in_one_pass(ranks, member)
    read = nbytes(p, *b) + sum(nbytes(dy[index]) for index in together)
    shares = _one_pass_shares([dy[index] for index in together], ranks, member, together)
    for index in sorted(set(member) - set(together)):
        mine = [rank for rank, owner in zip(ranks, member, strict=True) if owner == index]
        none = [0.0] * len(mine)
        both = (_project_passes(dy[index], mine, none), _grad_passes(dy[index], mine, none))
        for count, moved in both:
            read += count * nbytes(dy[index])
            shares += moved
    return Cost(
        flops=sum(4 * p.shape[0] * each.numel() for each in b),
        read=read + shares,
        written=nbytes(p, *b) + shares,
    )


def grad_a(
    x: torch.Tensor,
    ds: torch.Tensor,
    a: Sequence[torch.Tensor],
    seed: torch.Tensor | None,
    dropout: Sequence[float],
    rstd: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    gemma: bool,
) -> Cost:
    """Gradients dA = dS^T drop(x)."""
    count, shares = _grad_passes(x, [each.shape[0] for each in a], dropout)
    return Cost(
        flops=2 * x.numel() * ds.shape[1],
        read=count * nbytes(x, rstd, norm_weight) + nbytes(ds) + shares,
        written=nbytes(*a) + shares,
    )


def glu(
    gate: torch.Tensor,
    up: torch.Tensor,
    p: torch.Tensor | None,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
    activation: str,
) -> Cost:
    """act(gate) * up."""
    return Cost(
        flops=6 * gate.numel() + sum(2 * gate.shape[0] * each.numel() for each in b),
        read=nbytes(gate, up, p, *b),
        written=nbytes(gate),
        saved=nbytes(gate, up),
    )


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
) -> Cost:
    """The gradients of gate and up, and h."""
    return Cost(
        flops=14 * gate.numel() + sum(2 * gate.shape[0] * each.numel() for each in (*a, *b)),
        read=nbytes(dh, gate, up, p, *b, ds, *a),
        written=3 * nbytes(gate),
    )


def _project_passes(
    x: torch.Tensor, ranks: Sequence[int], dropout: Sequence[float]
) -> tuple[int, int]:
    """Passes over x, and bytes of shares."""
    launches = passes(ranks, PROJECT_WIDTH)
    shares = 0
    for pieces in launches:
        tiles = project_tiles(x.shape[0], x.shape[1], pieces, **_about(x, pieces, dropout))
        shares += _shared(tiles.shares, x.shape[0] * _rank(pieces))
    return len(launches), shares


def _grad_passes(
    x: torch.Tensor, ranks: Sequence[int], dropout: Sequence[float]
) -> tuple[int, int]:
    """Passes over x, and bytes of shares."""
    launches = passes(ranks, GRAD_WIDTH)
    shares = 0
    for pieces in launches:
        tiles = grad_a_tiles(x.shape[0], x.shape[1], pieces, **_about(x, pieces, dropout))
        shares += _shared(tiles.shares, x.shape[1] * _rank(pieces))
    return len(launches), shares


def _about(x: torch.Tensor, pieces: Sequence[Piece], dropout: Sequence[float]) -> dict[str, Any]:
    return {
        "itemsize": x.element_size(),
        "processors": num_multiprocessors(x.device),
        "dropout": any(dropout[piece.adapter] for piece in pieces),
    }


def _one_pass_shares(
    dy: Sequence[torch.Tensor],
    ranks: Sequence[int],
    member: Sequence[int],
    together: Sequence[int],
) -> int:
    if not dy:
        return 0
    tiles = grad_b_tiles(
        dy[0].shape[0],
        [each.shape[1] for each in dy],
        itemsize=dy[0].element_size(),
        processors=num_multiprocessors(dy[0].device),
    )
    moved = 0
    for each, owner in zip(dy, together, strict=True):
        tokens, features = each.shape
        rank = sum(rank for rank, other in zip(ranks, member, strict=True) if other == owner)
        moved += _shared(ceil_div(features, tiles.columns), tokens * rank)
        moved += _shared(tiles.shares, features * rank)
    return moved


def _rank(pieces: Sequence[Piece]) -> int:
    return sum(piece.rank for piece in pieces)


def _shared(shares: int, elements: int) -> int:
    """Bytes of shares of a sum of so many elements; they are written once and read once."""
    return SHARE * shares * elements if shares > 1 else 0
