"""P = drop(x) A^T in Triton: one pass over x for the adapters of a group.

Size legend: T tokens, K features, R rank.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from dtune_kernels.launch import dot_precision, launch, num_multiprocessors
from dtune_kernels.lora.dropout import keep_scale, threshold
from dtune_kernels.lora.tiles import PROJECT_WIDTH, Piece, ceil_div, passes, project_tiles
from dtune_kernels.lora.triton_common import Sum, add_shares, append, kept, load_tile, zeros


@triton.jit
def _step(
    total,
    x,
    a_ptr,
    stride_ar,
    stride_ak,
    seed_ptr,
    rows,
    first_column,
    features,
    ADAPTER: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    ranks = tl.arange(0, PADDED)
    columns = (first_column + tl.arange(0, COLUMNS)).to(tl.int64)
    mask = (columns < features)[:, None] & (ranks < RANK)[None, :]
    a = tl.load(a_ptr + columns[:, None] * stride_ak + ranks[None, :] * stride_ar, mask, 0.0)
    if THRESHOLD > 0:
        mask = kept(tl.load(seed_ptr), rows, first_column, ADAPTER, THRESHOLD, ROWS, COLUMNS)
        x = tl.where(mask, x, 0.0)
    return tl.dot(x, a.to(x.dtype), total, input_precision=PRECISION)


@triton.jit
def _project(
    x_ptr,
    a_ptrs,
    strides_ar,
    strides_ak,
    scales,
    seed_ptr,
    p_ptr,
    num_rows,
    features,
    stride_x,
    stride_share,
    stride_p,
    columns_each,
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
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * columns_each
    totals = ()
    for j in tl.static_range(COUNT):
        totals = append(totals, zeros(ROWS, PADDED[j]))
    for start in range(first, tl.minimum(first + columns_each, features), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        x = load_tile(x_ptr, rows, columns, num_rows, features, stride_x)
        summed = ()
        for j in tl.static_range(COUNT):
            total = _step(
                totals[j],
                x,
                a_ptrs[j],
                strides_ar[j],
                strides_ak[j],
                seed_ptr,
                rows,
                start,
                features,
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
    share_ptr = p_ptr + tl.program_id(1).to(tl.int64) * stride_share
    for j in tl.static_range(COUNT):
        ranks = tl.arange(0, PADDED[j])
        mask = (rows < num_rows)[:, None] & (ranks < RANK[j])[None, :]
        there = share_ptr + rows[:, None] * stride_p + (COLUMN[j] + ranks)[None, :]
        tl.store(there, totals[j] * scales[j], mask)


def project(
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    seed: torch.Tensor | None,
    dropout: Sequence[float],
) -> torch.Tensor:
    """See the reference. The last dimension of ``x`` is contiguous; allocates P and its shares."""
    ranks = [each.shape[0] for each in a]
    p = torch.empty((x.shape[0], sum(ranks)), dtype=torch.float32, device=x.device)
    scales = [keep_scale(each) for each in dropout]
    project_into(p, x, a, scales, seed, dropout)
    return p


def project_into(
    p: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    scales: Sequence[float],
    seed: torch.Tensor | None,
    dropout: Sequence[float],
) -> None:
    """Write scale * drop(x) A^T into the columns of ``p`` [T, sum of R], any rows apart.

    The A [R, K] have any strides.
    """
    launches = passes([each.shape[0] for each in a], PROJECT_WIDTH)
    for pieces in launches:
        _launch(p, x, a, scales, seed, dropout, pieces)


def _launch(
    p: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    scales: Sequence[float],
    seed: torch.Tensor | None,
    dropout: Sequence[float],
    pieces: Sequence[Piece],
) -> None:
    tokens, features = x.shape
    rates = [dropout[piece.adapter] for piece in pieces]
    tiles = project_tiles(
        tokens,
        features,
        pieces,
        itemsize=x.element_size(),
        processors=num_multiprocessors(x.device),
        dropout=any(rates),
    )
    first, last = pieces[0].column, pieces[-1].column + pieces[-1].rank
    total = Sum.of(p[:, first:last], tiles.shares)
    each = ceil_div(ceil_div(features, tiles.columns), tiles.shares) * tiles.columns
    parts = [a[piece.adapter][piece.first : piece.first + piece.rank] for piece in pieces]
    launch(
        _project,
        (ceil_div(tokens, tiles.rows), tiles.shares),
        x,
        tuple(parts),
        tuple(part.stride(0) for part in parts),
        tuple(part.stride(1) for part in parts),
        tuple(scales[piece.adapter] for piece in pieces),
        x if seed is None else seed,
        total.shares,
        tokens,
        features,
        x.stride(0),
        total.shares.stride(0),
        total.shares.stride(1),
        each,
        ADAPTER=tuple(piece.adapter for piece in pieces),
        COLUMN=tuple(piece.column - first for piece in pieces),
        RANK=tuple(piece.rank for piece in pieces),
        PADDED=tuple(piece.padded for piece in pieces),
        THRESHOLD=tuple(threshold(rate) for rate in rates),
        COUNT=len(pieces),
        PRECISION=dot_precision(x.dtype),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    add_shares([total])
