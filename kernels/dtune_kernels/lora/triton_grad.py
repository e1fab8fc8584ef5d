"""Gradients of A and B in Triton.

Size legend: T tokens, K or N features, R rank, M matrices dy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dtune_kernels.launch import dot_precision, launch, num_multiprocessors, pipeliner_fails
from dtune_kernels.lora.dropout import keep_scale, threshold
from dtune_kernels.lora.tiles import GRAD_WIDTH, Piece, ceil_div, grad_a_tiles, passes
from dtune_kernels.lora.triton_common import Sum, add_shares, append, kept, load_tile, zeros


@dataclass(frozen=True)
class RowNorm:
    """What makes x of h: 1 / rms(h) [T] and the norm's weight [K]."""

    rstd: torch.Tensor
    weight: torch.Tensor
    gemma: bool


@triton.jit
def _normed(h, rstd_ptr, weight_ptr, rows, columns, num_rows, features, GEMMA: tl.constexpr):
    """Form x of h, rounded as ``rms_norm`` rounds it."""
    rstd = tl.load(rstd_ptr + rows, rows < num_rows, 0.0)[:, None]
    weight = tl.load(weight_ptr + columns, columns < features, 0.0).to(tl.float32)[None, :]
    normed = h.to(tl.float32) * rstd
    if GEMMA:
        return (normed * (1.0 + weight)).to(h.dtype)
    return (normed.to(h.dtype).to(tl.float32) * weight).to(h.dtype)


@triton.jit
def _step(
    total,
    x,
    ds_ptr,
    stride_ds,
    seed_ptr,
    rows,
    first_column,
    num_rows,
    ADAPTER: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    ds = load_tile(ds_ptr, rows, tl.arange(0, PADDED), num_rows, RANK, stride_ds)
    if THRESHOLD > 0:
        mask = kept(tl.load(seed_ptr), rows, first_column, ADAPTER, THRESHOLD, ROWS, COLUMNS)
        x = tl.where(mask, x, 0.0)
    return tl.dot(tl.trans(x), ds.to(x.dtype), total, input_precision=PRECISION)


@triton.jit
def _grad_a(
    x_ptr,
    ds_ptr,
    da_ptrs,
    strides_share,
    strides_r,
    strides_k,
    scales,
    seed_ptr,
    rstd_ptr,
    weight_ptr,
    num_rows,
    features,
    stride_x,
    stride_ds,
    blocks_each,
    NORM: tl.constexpr,
    GEMMA: tl.constexpr,
    ADAPTER: tl.constexpr,
    COLUMN: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    THRESHOLD: tl.constexpr,
    COUNT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    first_column = tl.program_id(0) * COLUMNS
    columns = first_column + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * blocks_each
    totals = ()
    for j in tl.static_range(COUNT):
        totals = append(totals, zeros(COLUMNS, PADDED[j]))
    for block in range(first, tl.minimum(first + blocks_each, tl.cdiv(num_rows, ROWS))):
        rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        x = load_tile(x_ptr, rows, columns, num_rows, features, stride_x)
        if NORM:
            x = _normed(x, rstd_ptr, weight_ptr, rows, columns, num_rows, features, GEMMA)
        summed = ()
        for j in tl.static_range(COUNT):
            total = _step(
                totals[j],
                x,
                ds_ptr + COLUMN[j],
                stride_ds,
                seed_ptr,
                rows,
                first_column,
                num_rows,
                ADAPTER[j],
                RANK[j],
                PADDED[j],
                THRESHOLD[j],
                PRECISION,
                ROWS,
                COLUMNS,
            )
            summed = append(summed, total)
        totals = summed
    for j in tl.static_range(COUNT):
        ranks = tl.arange(0, PADDED[j])
        mask = (columns < features)[:, None] & (ranks < RANK[j])[None, :]
        share_ptr = da_ptrs[j] + tl.program_id(1).to(tl.int64) * strides_share[j]
        there = columns.to(tl.int64)[:, None] * strides_k[j] + ranks[None, :] * strides_r[j]
        tl.store(share_ptr + there, (totals[j] * scales[j]).to(da_ptrs[j].dtype.element_ty), mask)


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
    """See the reference. The last dimensions of ``x`` and ``ds`` are contiguous."""
    norm = None
    if rstd is not None and norm_weight is not None:
        norm = RowNorm(rstd, norm_weight, gemma)
    da = [torch.empty(each.shape, dtype=each.dtype, device=x.device) for each in a]
    scales = [keep_scale(each) for each in dropout]
    add_shares(grad_sums(x, ds, da, scales, seed, dropout, norm))
    return da


def grad_sums(
    x: torch.Tensor,
    ds: torch.Tensor,
    out: Sequence[torch.Tensor],
    scales: Sequence[float],
    seed: torch.Tensor | None,
    dropout: Sequence[float],
    norm: RowNorm | None,
    *,
    transposed: bool = False,
) -> list[Sum]:
    """Launch out = scale * dS^T drop(x) for adapters in turn; return the sums that are left.

    ``out`` are [R, K], or [K, R] where ``transposed``; dS is [T, sum of R].
    """
    ranks = [each.shape[1] if transposed else each.shape[0] for each in out]
    sums: list[Sum] = []
    for pieces in passes(ranks, GRAD_WIDTH):
        sums += _launch(x, ds, out, scales, seed, dropout, norm, pieces, transposed)
    return sums


def _launch(
    x: torch.Tensor,
    ds: torch.Tensor,
    out: Sequence[torch.Tensor],
    scales: Sequence[float],
    seed: torch.Tensor | None,
    dropout: Sequence[float],
    norm: RowNorm | None,
    pieces: Sequence[Piece],
    transposed: bool,
) -> list[Sum]:
    tokens, features = x.shape
    rates = [dropout[piece.adapter] for piece in pieces]
    tiles = grad_a_tiles(
        tokens,
        features,
        pieces,
        itemsize=x.element_size(),
        processors=num_multiprocessors(x.device),
        dropout=any(rates),
    )
    sums = [Sum.of(_ranks(out[each.adapter], each, transposed), tiles.shares) for each in pieces]
    along_r, along_k = (2, 1) if transposed else (1, 2)
    blocks = ceil_div(ceil_div(tokens, tiles.rows), max(tiles.shares, 1))
    together = norm is not None and len(pieces) > 1
    stages = 1 if together and pipeliner_fails(x.device) else tiles.stages
    launch(
        _grad_a,
        (ceil_div(features, tiles.columns), tiles.shares),
        x,
        ds,
        tuple(each.shares for each in sums),
        tuple(each.shares.stride(0) for each in sums),
        tuple(each.shares.stride(along_r) for each in sums),
        tuple(each.shares.stride(along_k) for each in sums),
        tuple(scales[piece.adapter] for piece in pieces),
        x if seed is None else seed,
        x if norm is None else norm.rstd,
        x if norm is None else norm.weight,
        tokens,
        features,
        x.stride(0),
        ds.stride(0),
        blocks,
        NORM=norm is not None,
        GEMMA=norm is not None and norm.gemma,
        ADAPTER=tuple(piece.adapter for piece in pieces),
        COLUMN=tuple(piece.column for piece in pieces),
        RANK=tuple(piece.rank for piece in pieces),
        PADDED=tuple(piece.padded for piece in pieces),
        THRESHOLD=tuple(threshold(rate) for rate in rates),
        COUNT=len(pieces),
        PRECISION=dot_precision(x.dtype),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        num_warps=tiles.warps,
        num_stages=stages,
    )
    return sums


def _ranks(out: torch.Tensor, piece: Piece, transposed: bool) -> torch.Tensor:
    last = piece.first + piece.rank
    return out[:, piece.first : last] if transposed else out[piece.first : last]
