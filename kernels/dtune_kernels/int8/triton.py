"""Quantisation of rows to 8 bits in Triton.

Shape legend: as the reference.
"""

import torch
import triton
import triton.language as tl

from dtune_kernels.int8.reference import ONE_STEP, STEPS
from dtune_kernels.launch import launch

ROWS, COLUMNS = 4, 2048
"""Tile that a program decodes with 4 warps."""
SEGMENT = 4096
"""Elements of a row that a program encodes at a time with 8 warps."""


@triton.jit
def _decode(
    codes_ptr,
    absmax_ptr,
    out_ptr,
    num_rows,
    columns,
    ONE_STEP: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS
    column = tl.program_id(1) * COLUMNS
    rows = tl.arange(0, ROWS)
    inside = tl.arange(0, COLUMNS)
    # What lies before this program, in pointers: what is added to them fits into 32 bits.
    start = row * columns + column
    at = rows[:, None] * columns + inside[None, :]
    if EVEN:
        codes = tl.load(codes_ptr + start + at)
        absmax = tl.load(absmax_ptr + row + rows)
    else:
        there = rows < num_rows - row
        mask = there[:, None] & (inside < columns - column)[None, :]
        codes = tl.load(codes_ptr + start + at, mask, 0)
        absmax = tl.load(absmax_ptr + row + rows, there, 0.0)
    weight = codes.to(tl.float32) * absmax[:, None] * ONE_STEP
    if EVEN:
        tl.store(out_ptr + start + at, weight.to(out_ptr.dtype.element_ty))
    else:
        tl.store(out_ptr + start + at, weight.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _encode(
    weight_ptr,
    codes_ptr,
    absmax_ptr,
    columns,
    STEPS: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = row * columns
    inside = tl.arange(0, SEGMENT)
    largest = tl.zeros((SEGMENT,), tl.float32)
    nan = tl.zeros((SEGMENT,), tl.int32)
    for segment in range(tl.cdiv(columns, SEGMENT)):
        at = segment * SEGMENT + inside
        x = tl.load(weight_ptr + start + at, at < columns, 0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        nan |= (x != x).to(tl.int32)
    absmax = tl.max(largest, 0)
    absmax = tl.where(tl.max(nan, 0) != 0, float("nan"), absmax)
    tl.store(absmax_ptr + row, absmax)
    some = tl.where(absmax == 0.0, 1.0, absmax)
    scale = tl.div_rn(1.0, some) * STEPS
    finite = (absmax != 0.0) & (scale < float("inf"))
    scale = tl.where(finite, scale, 0.0)
    for segment in range(tl.cdiv(columns, SEGMENT)):
        at = segment * SEGMENT + inside
        x = tl.load(weight_ptr + start + at, at < columns, 0.0).to(tl.float32) * scale
        x = tl.where(x == x, x, 0.0)
        # To the nearest integer, ties to even: the sum has no bits below one.
        rounded = (x + 12582912.0) - 12582912.0
        tl.store(codes_ptr + start + at, rounded.to(tl.int8), at < columns)


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference. The weight is contiguous."""
    num_rows, columns = weight.shape
    codes = torch.empty((num_rows, columns), dtype=torch.int8, device=weight.device)
    absmax = torch.empty(num_rows, dtype=torch.float32, device=weight.device)
    launch(
        _encode,
        (num_rows,),
        weight,
        codes,
        absmax,
        columns,
        STEPS=STEPS,
        SEGMENT=SEGMENT,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return codes, absmax


def dequantize_int8(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See the reference. The codes are contiguous."""
    num_rows, columns = codes.shape
    out = torch.empty((num_rows, columns), dtype=dtype, device=codes.device)
    launch(
        _decode,
        (triton.cdiv(num_rows, ROWS), triton.cdiv(columns, COLUMNS)),
        codes,
        absmax,
        out,
        num_rows,
        columns,
        ONE_STEP=ONE_STEP,
        EVEN=num_rows % ROWS == 0 and columns % COLUMNS == 0,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out
