"""y += s * mask * (P B^T) in Triton: one read and one write of each y.

Size legend: T tokens, N features, R rank, M matrices y.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from dtune_kernels.launch import dot_precision, launch
from dtune_kernels.lora.tiles import Tiles, ceil_div, expand_tiles, first_adapters
from dtune_kernels.lora.triton_common import LowRank, layout, with_adapters


@triton.jit
def _expand_one(
    y_ptr,
    stride_y,
    out_ptr,
    stride_out,
    low,
    first_column,
    num_rows,
    num_columns,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    y = with_adapters(
        y_ptr,
        stride_y,
        low,
        rows,
        first_column,
        num_rows,
        num_columns,
        FROM,
        TO,
        LAYOUT,
        PRECISION,
        ROWS,
        COLUMNS,
    )
    columns = first_column + tl.arange(0, COLUMNS)
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    there = out_ptr + rows[:, None] * stride_out + columns[None, :]
    tl.store(there, y.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _expand(
    y_ptrs,
    strides_y,
    out_ptrs,
    strides_out,
    low,
    num_rows,
    num_columns,
    COUNT: tl.constexpr,
    TILE: tl.constexpr,
    FIRST: tl.constexpr,
    LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(1)
    for m in tl.static_range(COUNT):
        if (tile >= TILE[m]) & (tile < TILE[m + 1]):
            _expand_one(
                y_ptrs[m],
                strides_y[m],
                out_ptrs[m],
                strides_out[m],
                low,
                (tile - TILE[m]) * COLUMNS,
                num_rows,
                num_columns[m],
                FIRST[m],
                FIRST[m + 1],
                LAYOUT,
                PRECISION,
                ROWS,
                COLUMNS,
            )


def expand_(
    y: Sequence[torch.Tensor],
    p: torch.Tensor,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
    seed: torch.Tensor | None,
    dropout: Sequence[float],
) -> None:
    """See the reference. The last dimensions of the ``y`` and of ``p`` are contiguous.

    Overwrites the ``y``, allocates nothing. The B [N, R] have any strides.
    """
    _launch(y, y, p, b, member, scale, seed, dropout)


def expand(
    y: Sequence[torch.Tensor],
    p: torch.Tensor,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
) -> list[torch.Tensor]:
    """See the reference. The last dimensions of the ``y`` and of ``p`` are contiguous."""
    out = [torch.empty(each.shape, dtype=each.dtype, device=each.device) for each in y]
    _launch(y, out, p, b, member, scale, None, [0.0] * len(b))
    return out


def _launch(
    y: Sequence[torch.Tensor],
    out: Sequence[torch.Tensor],
    p: torch.Tensor,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
    seed: torch.Tensor | None,
    dropout: Sequence[float],
) -> None:
    tokens = p.shape[0]
    tiles = expand_tiles(
        tokens,
        max(each.shape[1] for each in y),
        [each.shape[1] for each in b],
        itemsize=y[0].element_size(),
    )
    launch(
        _expand,
        (ceil_div(tokens, tiles.rows), _tile_starts(y, tiles)[-1]),
        tuple(y),
        tuple(each.stride(0) for each in y),
        tuple(out),
        tuple(each.stride(0) for each in out),
        LowRank.of(p, b, scale, seed, dropout, unused=p),
        tokens,
        tuple(each.shape[1] for each in y),
        COUNT=len(y),
        TILE=_tile_starts(y, tiles),
        FIRST=first_adapters(member, len(y)),
        LAYOUT=layout(b, dropout),
        PRECISION=dot_precision(y[0].dtype),
        ROWS=tiles.rows,
        COLUMNS=tiles.columns,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _tile_starts(y: Sequence[torch.Tensor], tiles: Tiles) -> tuple[int, ...]:
    counts = [ceil_div(each.shape[1], tiles.columns) for each in y]
    return tuple(sum(counts[:index]) for index in range(len(y) + 1))
