"""DoRA in Triton: the norm from one read of W, the scaled output and its gradients from one pass.

B A exists only as a tile in registers. Sums over K or T are cut into shares, which are added up
afterwards in one order.

Size legend: T tokens, K features in, O features out, R rank.
"""

import torch
import triton
import triton.language as tl

from dtune_kernels.launch import dot_precision, launch, next_power_of_two, num_multiprocessors

BLOCK_R = 64
"""Ranks of one ``tl.dot``; more than these are taken in turn, half as many at a time."""


@triton.jit
def _load(ptr, rows, columns, num_rows, num_columns, stride_row, stride_column):
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    at = rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column
    return tl.load(ptr + at, mask, 0.0)


@triton.jit
def _product(
    left_ptr,
    right_ptr,
    rows,
    columns,
    num_rows,
    num_columns,
    stride_row,
    stride_left,
    stride_right,
    stride_column,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Tile [ROWS, COLUMNS], fp32, of the product of [.., R] and [R, ..], rounded to DTYPE.

    Zeros where RANK is 0.
    """
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, RANK, PADDED):
        ranks = first + tl.arange(0, PADDED)
        left = _load(left_ptr, rows, ranks, num_rows, RANK, stride_row, stride_left)
        right = _load(right_ptr, ranks, columns, RANK, num_columns, stride_right, stride_column)
        total = tl.dot(left.to(DTYPE), right.to(DTYPE), total, input_precision=PRECISION)
    return total


@triton.jit
def _norm(
    weight_ptr,
    a_ptr,
    b_ptr,
    shares_ptr,
    num_rows,
    features,
    scale,
    stride_weight,
    stride_ar,
    stride_ak,
    stride_bo,
    stride_br,
    blocks_each,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dtype = weight_ptr.dtype.element_ty
    total = tl.zeros((ROWS,), tl.float32)
    first = tl.program_id(1) * blocks_each
    for block in range(first, tl.minimum(first + blocks_each, tl.cdiv(features, COLUMNS))):
        columns = block * COLUMNS + tl.arange(0, COLUMNS)
        weight = _load(weight_ptr, rows, columns, num_rows, features, stride_weight, 1)
        product = _product(
            b_ptr,
            a_ptr,
            rows,
            columns,
            num_rows,
            features,
            stride_bo,
            stride_br,
            stride_ar,
            stride_ak,
            RANK,
            PADDED,
            dtype,
            PRECISION,
            ROWS,
            COLUMNS,
        )
        whole = weight.to(tl.float32) + scale * product
        total += tl.sum(whole * whole, axis=1)
    there = shares_ptr + tl.program_id(1).to(tl.int64) * num_rows + rows
    tl.store(there, total, rows < num_rows)


@triton.jit
def _scaled(
    y0_ptr,
    p_ptr,
    b_ptr,
    gain_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    features,
    scale,
    stride_y0,
    stride_p,
    stride_bo,
    stride_br,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    dtype = y_ptr.dtype.element_ty
    y0 = _load(y0_ptr, rows, columns, num_rows, features, stride_y0, 1)
    product = _product(
        p_ptr,
        b_ptr,
        rows,
        columns,
        num_rows,
        features,
        stride_p,
        1,
        stride_br,
        stride_bo,
        RANK,
        PADDED,
        dtype,
        PRECISION,
        ROWS,
        COLUMNS,
    )
    gain = tl.load(gain_ptr + columns, columns < features, 0.0).to(tl.float32)
    y = (y0.to(tl.float32) + scale * product) * gain[None, :]
    if BIAS:
        y += tl.load(bias_ptr + columns, columns < features, 0.0).to(tl.float32)[None, :]
    mask = (rows < num_rows)[:, None] & (columns < features)[None, :]
    there = y_ptr + rows.to(tl.int64)[:, None] * features + columns[None, :]
    tl.store(there, y.to(dtype), mask)


@triton.jit
def _scaled_backward(
    dy_ptr,
    y0_ptr,
    p_ptr,
    b_ptr,
    gain_ptr,
    dv_ptr,
    shares_ptr,
    num_rows,
    features,
    scale,
    stride_dy,
    stride_y0,
    stride_p,
    stride_bo,
    stride_br,
    blocks_each,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    dtype = dv_ptr.dtype.element_ty
    gain = tl.load(gain_ptr + columns, columns < features, 0.0).to(tl.float32)
    dgain = tl.zeros((COLUMNS,), tl.float32)
    first = tl.program_id(1) * blocks_each
    for block in range(first, tl.minimum(first + blocks_each, tl.cdiv(num_rows, ROWS))):
        rows = block * ROWS + tl.arange(0, ROWS)
        dy = _load(dy_ptr, rows, columns, num_rows, features, stride_dy, 1).to(tl.float32)
        y0 = _load(y0_ptr, rows, columns, num_rows, features, stride_y0, 1)
        product = _product(
            p_ptr,
            b_ptr,
            rows,
            columns,
            num_rows,
            features,
            stride_p,
            1,
            stride_br,
            stride_bo,
            RANK,
            PADDED,
            dtype,
            PRECISION,
            ROWS,
            COLUMNS,
        )
        dgain += tl.sum(dy * (y0.to(tl.float32) + scale * product), axis=0)
        mask = (rows < num_rows)[:, None] & (columns < features)[None, :]
        there = dv_ptr + rows.to(tl.int64)[:, None] * features + columns[None, :]
        tl.store(there, (dy * gain[None, :]).to(dtype), mask)
    there = shares_ptr + tl.program_id(1).to(tl.int64) * features + columns
    tl.store(there, dgain, columns < features)


def _padded(size: int) -> int:
    """Size of a tile of ``tl.dot`` that holds ``size``."""
    return max(16, next_power_of_two(size))


def _tile(
    rows: int, columns: int, rank: int, x: torch.Tensor, *, row_bytes: int = 256
) -> dict[str, int | str]:
    """64 rows, which a wgmma has, and ``row_bytes`` of each, in 8 warps."""
    tile_rows = min(64, _padded(rows))
    tile_columns = min(row_bytes // max(x.element_size(), 2), _padded(columns))
    return {
        "RANK": rank,
        "PADDED": _padded(rank) if rank <= BLOCK_R else BLOCK_R // 2,
        "PRECISION": dot_precision(x.dtype),
        "ROWS": tile_rows,
        "COLUMNS": tile_columns,
        "num_warps": 8,
        "num_stages": 2,
    }


def _shares(programs: int, blocks: int, x: torch.Tensor) -> int:
    """Cut ``blocks`` that are summed so that four programs meet on each multiprocessor."""
    wanted = 4 * num_multiprocessors(x.device) // max(programs, 1)
    return max(1, min(wanted, blocks // 2))


def norm(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """See the reference. The last dimension of ``weight`` is contiguous; A and B have any strides.

    Factors of B A are rounded to the dtype of W. Allocates shares of the sums [S, O], fp32.
    """
    rows, features = weight.shape
    tile = _tile(rows, features, a.shape[0], weight)
    grid = triton.cdiv(rows, tile["ROWS"])
    blocks = triton.cdiv(features, tile["COLUMNS"])
    count = _shares(grid, blocks, weight)
    shares = torch.empty((count, rows), dtype=torch.float32, device=weight.device)
    launch(
        _norm,
        (grid, count),
        weight,
        a,
        b,
        shares,
        rows,
        features,
        scale,
        weight.stride(0),
        a.stride(0),
        a.stride(1),
        b.stride(0),
        b.stride(1),
        triton.cdiv(blocks, count),
        **tile,
    )
    return shares.sum(0).sqrt_()


def scaled(
    y0: torch.Tensor,
    p: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    gain: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """See the reference. The last dimensions of ``y0`` and ``p`` are contiguous; allocates y.

    P and B are rounded to the dtype of y0.
    """
    rows, features = y0.shape
    y = torch.empty((rows, features), dtype=y0.dtype, device=y0.device)
    tile = _tile(rows, features, b.shape[1], y0)
    launch(
        _scaled,
        (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(features, tile["COLUMNS"])),
        y0,
        p,
        b,
        gain,
        gain if bias is None else bias,
        y,
        rows,
        features,
        scale,
        y0.stride(0),
        p.stride(0),
        b.stride(0),
        b.stride(1),
        BIAS=bias is not None,
        **tile,
    )
    return y


def scaled_backward(
    dy: torch.Tensor,
    y0: torch.Tensor,
    p: torch.Tensor | None,
    b: torch.Tensor | None,
    scale: float,
    gain: torch.Tensor,
    norm: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference. The last dimensions of ``dy``, ``y0`` and ``p`` are contiguous.

    Allocates dv and shares of dm [S, O], fp32.
    """
    rows, features = y0.shape
    dv = torch.empty((rows, features), dtype=y0.dtype, device=y0.device)
    if p is None or b is None:
        p, b, rank = y0, y0, 0
    else:
        rank = b.shape[1]
    # Half the width of the forward's tiles: three of them are in registers at once.
    tile = _tile(rows, features, rank, y0, row_bytes=128)
    grid = triton.cdiv(features, tile["COLUMNS"])
    blocks = triton.cdiv(rows, tile["ROWS"])
    count = _shares(grid, blocks, y0)
    shares = torch.empty((count, features), dtype=torch.float32, device=y0.device)
    launch(
        _scaled_backward,
        (grid, count),
        dy,
        y0,
        p,
        b,
        gain,
        dv,
        shares,
        rows,
        features,
        scale,
        dy.stride(0),
        y0.stride(0),
        p.stride(0),
        b.stride(0),
        b.stride(1),
        triton.cdiv(blocks, count),
        **tile,
    )
    return dv, shares.sum(0).div_(norm)
