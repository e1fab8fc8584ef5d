"""What the LoRA kernels share: tiles, dropout masks, low-rank products, sums of shares.

Size legend: T tokens, N features, R rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from dtune_kernels.launch import launch
from dtune_kernels.lora.dropout import keep_scale, threshold
from dtune_kernels.lora.tiles import ceil_div, columns_of, rank_blocks

PHILOX_ROUNDS: tl.constexpr = tl.constexpr(7)


@triton.jit
def load_tile(ptr, rows, columns, num_rows, num_columns, stride) -> Any:
    """Load [ROWS, COLUMNS] of a matrix whose rows lie ``stride`` apart; 0 outside."""
    mask = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask, 0.0)


@triton.jit
def zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> Any:
    """Sums in fp32; a function since a tuple's item is no constant outside of a call."""
    return tl.zeros((ROWS, COLUMNS), tl.float32)


@triton.jit
def kept(
    seed,
    rows,
    first_column,
    ADAPTER: tl.constexpr,
    THRESHOLD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> Any:
    """Mask [ROWS, COLUMNS] of what dropout keeps; see ``dropout.kept``.

    One call of Philox gives four neighbouring columns.
    """
    quads = (first_column // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)
    u0, u1, u2, u3 = tl.philox(
        seed, quads[None, :], rows.to(tl.uint32)[:, None], ADAPTER, 0, PHILOX_ROUNDS
    )
    words = tl.join(tl.join(u0, u2), tl.join(u1, u3)).reshape(ROWS, COLUMNS)
    return words >= THRESHOLD


@triton.jit
def append(items, item) -> Any:
    """A tuple with one item more; Triton knows no other way."""
    return items + (item,)  # noqa: RUF005


class LowRank(NamedTuple):
    """Adapters whose scale * mask * P B^T is added to tiles; ``layout`` has their constants."""

    p: torch.Tensor
    """[T, sum of R], the last dimension contiguous."""
    stride_p: int
    b: tuple[torch.Tensor, ...]
    """Of each [N, R], any strides."""
    strides_n: tuple[int, ...]
    strides_r: tuple[int, ...]
    scales: tuple[float, ...]
    seed: torch.Tensor

    @staticmethod
    def of(
        p: torch.Tensor | None,
        b: Sequence[torch.Tensor],
        scale: Sequence[float],
        seed: torch.Tensor | None,
        dropout: Sequence[float],
        *,
        unused: torch.Tensor,
    ) -> "LowRank":
        """Put them together; ``unused`` stands for a tensor that is not read."""
        return LowRank(
            unused if p is None else p,
            0 if p is None else p.stride(0),
            tuple(b),
            tuple(each.stride(0) for each in b),
            tuple(each.stride(1) for each in b),
            tuple(s * keep_scale(rate) for s, rate in zip(scale, dropout, strict=True)),
            unused if seed is None else seed,
        )


def layout(
    b: Sequence[torch.Tensor], dropout: Sequence[float]
) -> tuple[tuple[int, int, int, int], ...]:
    """Of each adapter its first column in P, its rank, the ranks of a tile, dropout's threshold."""
    ranks = [each.shape[1] for each in b]
    thresholds = [threshold(rate) for rate in dropout]
    return tuple(zip(columns_of(ranks), ranks, rank_blocks(ranks), thresholds, strict=True))


@triton.jit
def _added(
    low,
    rows,
    first_column,
    num_rows,
    num_columns,
    J: tl.constexpr,
    LAYOUT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What adapter J adds to a tile, fp32."""
    COLUMN: tl.constexpr = LAYOUT[J][0]
    RANK: tl.constexpr = LAYOUT[J][1]
    BLOCK_R: tl.constexpr = LAYOUT[J][2]
    THRESHOLD: tl.constexpr = LAYOUT[J][3]
    columns = (first_column + tl.arange(0, COLUMNS)).to(tl.int64)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, RANK, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        p = load_tile(low.p + COLUMN, rows, ranks, num_rows, RANK, low.stride_p)
        mask = (ranks < RANK)[:, None] & (columns < num_columns)[None, :]
        there = columns[None, :] * low.strides_n[J] + ranks[:, None] * low.strides_r[J]
        b = tl.load(low.b[J] + there, mask, 0.0)
        total = tl.dot(p.to(DTYPE), b.to(DTYPE), total, input_precision=PRECISION)
    if THRESHOLD > 0:
        mask = kept(tl.load(low.seed), rows, first_column, J, THRESHOLD, ROWS, COLUMNS)
        total = tl.where(mask, total, 0.0)
    return total * low.scales[J]


@triton.jit
def with_adapters(
    base_ptr,
    stride,
    low,
    rows,
    first_column,
    num_rows,
    num_columns,
    FROM: tl.constexpr,
    TO: tl.constexpr,
    LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> Any:
    """A tile of a matrix [T, N] with what adapters FROM .. TO add to it, fp32."""
    columns = first_column + tl.arange(0, COLUMNS)
    base = load_tile(base_ptr, rows, columns, num_rows, num_columns, stride)
    total = base.to(tl.float32)
    for j in tl.static_range(FROM, TO):
        total += _added(
            low,
            rows,
            first_column,
            num_rows,
            num_columns,
            j,
            LAYOUT,
            base.dtype,
            PRECISION,
            ROWS,
            COLUMNS,
        )
    return total


@triton.jit
def _add_one(share_ptr, out_ptr, rows, width, stride_out, count, BLOCK: tl.constexpr):
    size = tl.cast(rows, tl.int64) * width  # rows that are 1 are a constant in a tuple
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for share in range(count):
        total += tl.load(share_ptr + share * size + at, at < size, 0.0)
    there = out_ptr + at // width * stride_out + at % width
    tl.store(there, total.to(out_ptr.dtype.element_ty), at < size)


@triton.jit
def _add_shares(
    share_ptrs,
    out_ptrs,
    rows,
    widths,
    strides_out,
    counts,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for j in tl.static_range(COUNT):
        if tl.program_id(1) == j:
            _add_one(
                share_ptrs[j], out_ptrs[j], rows[j], widths[j], strides_out[j], counts[j], BLOCK
            )


@dataclass(frozen=True)
class Sum:
    """A matrix ``out`` [T, R], rows any distance apart, and its shares [n, T, R], contiguous."""

    out: torch.Tensor
    shares: torch.Tensor

    @staticmethod
    def of(out: torch.Tensor, count: int) -> "Sum":
        """Where a kernel writes ``count`` shares: ``out`` itself if one is all."""
        if count == 1:
            return Sum(out, out[None])
        shape = (count, *out.shape)
        return Sum(out, torch.empty(shape, dtype=torch.float32, device=out.device))


def add_shares(sums: Sequence[Sum]) -> None:
    """Add up the shares of all sums by one launch; none at all where each has a single share."""
    sums = [each for each in sums if each.shares.shape[0] != 1]
    if not sums:
        return
    block = 512
    launch(
        _add_shares,
        (max(ceil_div(each.out.numel(), block) for each in sums), len(sums)),
        tuple(each.shares for each in sums),
        tuple(each.out for each in sums),
        tuple(each.out.shape[0] for each in sums),
        tuple(each.out.shape[1] for each in sums),
        tuple(each.out.stride(0) for each in sums),
        tuple(each.shares.shape[0] for each in sums),
        COUNT=len(sums),
        BLOCK=block,
        num_warps=4,
    )
