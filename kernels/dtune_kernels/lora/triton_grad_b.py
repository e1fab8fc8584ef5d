"""dS = s dY B and dB = s dY^T P in Triton: one pass over the dy of a group, two for large ranks.

Size legend: T tokens, N features, R rank, M matrices dy.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from dtune_kernels.launch import dot_precision, launch, num_multiprocessors
from dtune_kernels.lora.tiles import (
    ceil_div,
    columns_of,
    first_adapters,
    grad_b_tiles,
    in_one_pass,
    padded,
)
from dtune_kernels.lora.triton_common import Sum, add_shares, append, load_tile, zeros
from dtune_kernels.lora.triton_grad import grad_sums
from dtune_kernels.lora.triton_project import project_into


@triton.jit
def _load_b(
    b_ptr,
    stride_bn,
    stride_br,
    columns,
    num_columns,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    ranks = tl.arange(0, PADDED)
    mask = (columns < num_columns)[:, None] & (ranks < RANK)[None, :]
    there = b_ptr + columns.to(tl.int64)[:, None] * stride_bn + ranks[None, :] * stride_br
    return tl.load(there, mask, 0.0).to(DTYPE)


@triton.jit
def _step(
    total,
    dy,
    b,
    p_ptr,
    stride_p,
    ds_ptr,
    stride_ds,
    scale,
    rows,
    num_rows,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write this tile's share of dS, return the sum of dB [COLUMNS, PADDED] with this tile's."""
    ranks = tl.arange(0, PADDED)
    ds = tl.dot(dy, b, input_precision=PRECISION) * scale
    mask = (rows < num_rows)[:, None] & (ranks < RANK)[None, :]
    there = ds_ptr + rows[:, None] * stride_ds + ranks[None, :]
    tl.store(there, ds, mask)
    p = load_tile(p_ptr, rows, ranks, num_rows, RANK, stride_p)
    return tl.dot(tl.trans(dy), p.to(dy.dtype), total, input_precision=PRECISION)


@triton.jit
def _grad_b_one(
    dy_ptr,
    stride_dy,
    num_columns,
    tile,
    p_ptr,
    stride_p,
    b_ptrs,
    strides_bn,
    strides_br,
    scales,
    ds_ptrs,
    strides_ds_share,
    strides_ds,
    db_ptrs,
    strides_db_share,
    strides_db,
    num_rows,
    blocks_each,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    COLUMN: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * blocks_each
    weights = ()
    totals = ()
    for j in tl.static_range(FROM, TO):
        weight = _load_b(
            b_ptrs[j],
            strides_bn[j],
            strides_br[j],
            columns,
            num_columns,
            RANK[j],
            PADDED[j],
            dy_ptr.dtype.element_ty,
        )
        weights = append(weights, weight)
        totals = append(totals, zeros(COLUMNS, PADDED[j]))
    for block in range(first, tl.minimum(first + blocks_each, tl.cdiv(num_rows, ROWS))):
        rows = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        dy = load_tile(dy_ptr, rows, columns, num_rows, num_columns, stride_dy)
        summed = ()
        for j in tl.static_range(FROM, TO):
            total = _step(
                totals[j - FROM],
                dy,
                weights[j - FROM],
                p_ptr + COLUMN[j],
                stride_p,
                ds_ptrs[j] + tile.to(tl.int64) * strides_ds_share[j],
                strides_ds[j],
                scales[j],
                rows,
                num_rows,
                RANK[j],
                PADDED[j],
                PRECISION,
            )
            summed = append(summed, total)
        totals = summed
    for j in tl.static_range(FROM, TO):
        ranks = tl.arange(0, PADDED[j])
        mask = (columns < num_columns)[:, None] & (ranks < RANK[j])[None, :]
        share_ptr = db_ptrs[j] + tl.program_id(1).to(tl.int64) * strides_db_share[j]
        there = share_ptr + columns.to(tl.int64)[:, None] * strides_db[j] + ranks[None, :]
        db = totals[j - FROM] * scales[j]
        tl.store(there, db.to(db_ptrs[j].dtype.element_ty), mask)


@triton.jit
def _grad_b(
    dy_ptrs,
    strides_dy,
    num_columns,
    p_ptr,
    stride_p,
    b_ptrs,
    strides_bn,
    strides_br,
    scales,
    ds_ptrs,
    strides_ds_share,
    strides_ds,
    db_ptrs,
    strides_db_share,
    strides_db,
    num_rows,
    blocks_each,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMN: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0)
    for m in tl.static_range(COUNT):
        if (tile >= TILE[m]) & (tile < TILE[m + 1]):
            _grad_b_one(
                dy_ptrs[m],
                strides_dy[m],
                num_columns[m],
                tile - TILE[m],
                p_ptr,
                stride_p,
                b_ptrs,
                strides_bn,
                strides_br,
                scales,
                ds_ptrs,
                strides_ds_share,
                strides_ds,
                db_ptrs,
                strides_db_share,
                strides_db,
                num_rows,
                blocks_each,
                FIRST[m],
                FIRST[m + 1],
                COLUMN,
                RANK,
                PADDED,
                PRECISION,
                ROWS,
                COLUMNS,
            )


def grad_b(
    dy: Sequence[torch.Tensor],
    p: torch.Tensor,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """See the reference. The last dimensions of the ``dy`` and of ``p`` are contiguous."""
    ds = torch.empty_like(p, memory_format=torch.contiguous_format)
    db = [torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in b]
    ranks = [each.shape[1] for each in b]
    starts = columns_of(ranks)
    together = in_one_pass(ranks, member)
    sums: list[Sum] = []
    for index, each in enumerate(dy):
        mine = [j for j, owner in enumerate(member) if owner == index]
        if mine and index not in together:
            columns = slice(starts[mine[0]], starts[mine[-1]] + ranks[mine[-1]])
            chosen, out = [b[j].t() for j in mine], [db[j] for j in mine]
            scales, none = [scale[j] for j in mine], [0.0] * len(mine)
            project_into(ds[:, columns], each, chosen, scales, None, none)
            sums += grad_sums(each, p[:, columns], out, scales, None, none, None, transposed=True)
    if together:
        sums += _one_pass(dy, p, b, member, scale, ds, db, together)
    add_shares(sums)
    return ds, db


def _one_pass(
    dy: Sequence[torch.Tensor],
    p: torch.Tensor,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
    ds: torch.Tensor,
    db: Sequence[torch.Tensor],
    together: Sequence[int],
) -> list[Sum]:
    dys = [dy[index] for index in together]
    tokens = p.shape[0]
    tiles = grad_b_tiles(
        tokens,
        [each.shape[1] for each in dys],
        itemsize=dys[0].element_size(),
        processors=num_multiprocessors(p.device),
    )
    counts = [ceil_div(each.shape[1], tiles.columns) for each in dys]
    mine = [j for j, owner in enumerate(member) if owner in together]
    owners = [together.index(member[j]) for j in mine]
    ranks, starts = [b[j].shape[1] for j in mine], columns_of([each.shape[1] for each in b])
    ds_sums = [
        Sum.of(ds[:, starts[j] : starts[j] + b[j].shape[1]], counts[owner])
        for j, owner in zip(mine, owners, strict=True)
    ]
    db_sums = [Sum.of(db[j], tiles.shares) for j in mine]
    launch(
        _grad_b,
        (sum(counts), tiles.shares),
        tuple(dys),
        tuple(each.stride(0) for each in dys),
        tuple(each.shape[1] for each in dys),
        p,
        p.stride(0),
        tuple(b[j] for j in mine),
        tuple(b[j].stride(0) for j in mine),
        tuple(b[j].stride(1) for j in mine),
        tuple(scale[j] for j in mine),
        tuple(each.shares for each in ds_sums),
        tuple(each.shares.stride(0) for each in ds_sums),
        tuple(each.shares.stride(1) for each in ds_sums),
        tuple(each.shares for each in db_sums),
        tuple(each.shares.stride(0) for each in db_sums),
        tuple(each.shares.stride(1) for each in db_sums),
        tokens,
        ceil_div(ceil_div(tokens, tiles.rows), max(tiles.shares, 1)),
        COUNT=len(dys),
        TILE=tuple(sum(counts[:index]) for index in range(len(counts) + 1)),
        FIRST=first_adapters(owners, len(dys)),
        COLUMN=tuple(starts[j] for j in mine),
        RANK=tuple(ranks),
        PADDED=tuple(padded(rank) for rank in ranks),
        PRECISION=dot_precision(dys[0].dtype),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return ds_sums + db_sums
