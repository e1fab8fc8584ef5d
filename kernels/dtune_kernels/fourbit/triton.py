"""Quantisation to 4 bits in Triton.

Shape legend: as the reference.
"""

import torch
import triton
import triton.language as tl

from dtune_kernels.fourbit.reference import mean
from dtune_kernels.fourbit.tables import GRID, GROUP, TINY, codebook, scale_codebook
from dtune_kernels.launch import launch

WORDS = 1024
"""Words of 8 codes that a program decodes with 4 warps: 6.3 instructions an element on sm_90 for
bf16 (512: 8.9; 2048: 5.7, but 153 registers)."""
TILE = 4096
"""Elements that a program encodes, the largest block."""


@triton.jit
def _decode(
    codes_ptr,
    absmax_ptr,
    absmax2_ptr,
    offset_ptr,
    values_ptr,
    scales_ptr,
    out_ptr,
    numel,
    first,
    NESTED: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
):
    SIZE: tl.constexpr = 8 * WORDS
    # At most 64 elements have their scale from one thread, so that none has many.
    PART: tl.constexpr = min(BLOCK, 64)
    PARTS: tl.constexpr = SIZE // PART
    start = tl.program_id(0).to(tl.int64) * SIZE
    left = numel - start
    at = tl.arange(0, SIZE)
    # What lies before this program, in pointers: what is added to them fits into 32 bits.
    block = start // BLOCK
    codes_ptr += start // 2
    absmax_ptr += block
    values = tl.load(values_ptr + tl.arange(0, 16))
    if TAIL and left < SIZE:
        byte = tl.load(codes_ptr + at // 2, at < left, 0).to(tl.int32)
        code = (byte >> ((at % 2) ^ 1) * 4) & 15
    else:
        # Little-endian words; within a byte, the high half is the first element.
        word = tl.load(codes_ptr.to(tl.pointer_type(tl.int32)) + tl.arange(0, WORDS))
        shift = (tl.arange(0, 8) ^ 1) * 4
        code = tl.reshape((word[:, None] >> shift[None, :]) & 15, (SIZE,))
    # The table lies in shared memory, in 16 banks: no conflicts.
    decoded = tl.reshape(tl.gather(values, code, 0), (PARTS, PART))
    parts = tl.arange(0, PARTS)
    blocks = parts // (BLOCK // PART)
    there = parts * PART < left
    if not TAIL:
        there = tl.full((PARTS,), True, tl.int1)
    absmax = tl.load(absmax_ptr + blocks, there, 0)
    if NESTED:
        block += first
        absmax2_ptr += block // GROUP
        absmax2 = tl.load(
            absmax2_ptr + ((block % GROUP).to(tl.int32) + blocks) // GROUP, there, 0.0
        )
        absmax = tl.load(scales_ptr + absmax.to(tl.int32)) * absmax2 + tl.load(offset_ptr)
    product = tl.reshape(decoded * absmax[:, None], (SIZE,)).to(out_ptr.dtype.element_ty)
    if TAIL and left < SIZE:
        tl.store(out_ptr + start + at, product, at < left)
    else:
        tl.store(out_ptr + start + at, product)


@triton.jit
def _encode(
    weight_ptr,
    pivots_ptr,
    order_ptr,
    codes_ptr,
    absmax_ptr,
    numel,
    num_bytes,
    CUDA: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCKS: tl.constexpr = TILE // BLOCK
    start = tl.program_id(0).to(tl.int64) * TILE
    left = numel - start
    blocks = tl.arange(0, BLOCKS)
    at = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(weight_ptr + start + at, at < left, 0.0).to(tl.float32)
    absmax = tl.max(tl.abs(x), 1)
    nan = tl.max((x != x).to(tl.int32), 1) != 0
    absmax = tl.where(nan, float("nan"), absmax)
    # A number this small is fp64 to Triton unless it is told.
    tiny = tl.full((BLOCKS,), TINY, tl.float32)
    divisor = tl.maximum(absmax, tiny)
    scaled = x * tl.div_rn(1.0, divisor)[:, None]
    if not CUDA and left < TILE:
        cut = (left > blocks * BLOCK) & (left < (blocks + 1) * BLOCK)
        scaled = tl.where(cut[:, None], tl.div_rn(x, divisor[:, None]), scaled)
        absmax = tl.where(cut & (absmax < tiny), tiny, absmax)
    tl.store(absmax_ptr + start // BLOCK + blocks, absmax, blocks * BLOCK < left)
    code = tl.zeros((BLOCKS, BLOCK), tl.int32) + tl.load(order_ptr)
    for rank in tl.static_range(15):
        above = scaled > tl.load(pivots_ptr + rank)
        code = tl.where(above, tl.load(order_ptr + rank + 1), code)
    high, low = tl.split(tl.reshape(code, (TILE // 2, 2)))
    at = tl.arange(0, TILE // 2)
    there = at < num_bytes - start // 2
    tl.store(codes_ptr + start // 2 + at, ((high << 4) | low).to(tl.uint8), there)


@triton.jit
def _encode_absmax(
    absmax_ptr,
    offset_ptr,
    pivots_ptr,
    codes_ptr,
    absmax2_ptr,
    count,
    CUDA: tl.constexpr,
    GRID: tl.constexpr,
    GROUP: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, GROUP)
    there = at < count - group * GROUP
    x = tl.load(absmax_ptr + group * GROUP + at, there, 0.0) - tl.load(offset_ptr)
    x = tl.where(there, x, 0.0)
    absmax2 = tl.max(tl.abs(x), 0)
    absmax2 = tl.where(tl.max((x != x).to(tl.int32), 0) != 0, float("nan"), absmax2)
    tl.store(absmax2_ptr + group, absmax2)
    scaled = x * tl.div_rn(1.0, tl.where(absmax2 == 0.0, 1.0, absmax2))
    if not CUDA:
        scaled = tl.minimum(tl.maximum(scaled, -1.0), 1.0)
        steps = ((scaled + 1.0) * 0.5 * GRID + 0.5).to(tl.int32).to(tl.float32)
        scaled = tl.div_rn(2.0 * steps, tl.full((GROUP,), GRID, tl.float32)) - 1.0
    code = tl.zeros((GROUP,), tl.int32)
    for bit in tl.static_range(8):
        step = 128 >> bit
        code += tl.where(scaled > tl.load(pivots_ptr + code + step - 1), step, 0)
    code = tl.where(absmax2 == 0.0, 0, code)
    tl.store(codes_ptr + group * GROUP + at, code.to(tl.uint8), there)


def quantize_4bit(
    weight: torch.Tensor, kind: str, block_size: int, cuda: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference. The weight is contiguous."""
    table = codebook(kind, cuda, weight.device)
    numel = weight.numel()
    codes = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=weight.device)
    blocks = triton.cdiv(numel, block_size)
    absmax = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    launch(
        _encode,
        (triton.cdiv(numel, TILE),),
        weight,
        table.pivots,
        table.order,
        codes,
        absmax,
        numel,
        codes.numel(),
        CUDA=cuda,
        TINY=TINY,
        BLOCK=block_size,
        TILE=TILE,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return codes, absmax


def quantize_absmax(
    absmax: torch.Tensor, cuda: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference. The scales are contiguous."""
    table = scale_codebook(absmax.device)
    count = absmax.numel()
    groups = triton.cdiv(count, GROUP)
    offset = mean(absmax)
    codes = torch.empty(count, dtype=torch.uint8, device=absmax.device)
    absmax2 = torch.empty(groups, dtype=torch.float32, device=absmax.device)
    launch(
        _encode_absmax,
        (groups,),
        absmax,
        offset,
        table.nearest if cuda else table.midpoints,
        codes,
        absmax2,
        count,
        CUDA=cuda,
        GRID=GRID,
        GROUP=GROUP,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return codes, absmax2, offset


def dequantize_4bit(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    absmax2: torch.Tensor | None,
    offset: torch.Tensor | None,
    rows: int,
    columns: int,
    kind: str,
    block_size: int,
    first: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See the reference. Copies codes that do not begin at a multiple of 16 bytes."""
    numel = rows * columns
    out = torch.empty((rows, columns), dtype=dtype, device=codes.device)
    if codes.storage_offset() % 16:
        codes = codes.clone()
    nested = absmax2 is not None
    launch(
        _decode,
        (triton.cdiv(numel, 8 * WORDS),),
        codes,
        absmax,
        absmax2 if nested else absmax,
        offset if nested else absmax,
        codebook(kind, False, codes.device).values,
        scale_codebook(codes.device).values,
        out,
        numel,
        first,
        NESTED=nested,
        TAIL=numel % (8 * WORDS) != 0,
        BLOCK=block_size,
        GROUP=GROUP,
        WORDS=WORDS,
        num_warps=4,
        # The product is rounded before the offset is added.
        enable_fp_fusion=False,
    )
    return out
