"""The ops of 4-bit weights: schemas, fakes, costs."""

from __future__ import annotations

import torch

from dtune_kernels.fourbit import reference
from dtune_kernels.fourbit.tables import GROUP
from dtune_kernels.library import Cost, Shape, define, nbytes

SOURCE = (
    "Dettmers et al. 2023, arXiv:2305.14314, eq. 1 and section 3;"
    " bitsandbytes.functional.quantize_4bit, dequantize_4bit"
)
BLOCK_SIZE = 64


def ceil_div(numerator: int, denominator: int) -> int:
    """Quotient, rounded up."""
    return -(-numerator // denominator)


def _quantize_fake(
    weight: torch.Tensor, kind: str, block_size: int, cuda: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    numel = weight.numel()
    return (
        weight.new_empty((numel + 1) // 2, dtype=torch.uint8),
        weight.new_empty(ceil_div(numel, block_size), dtype=torch.float32),
    )


def _quantize_absmax_fake(
    absmax: torch.Tensor, cuda: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        absmax.new_empty(absmax.shape, dtype=torch.uint8),
        absmax.new_empty(ceil_div(absmax.numel(), GROUP), dtype=torch.float32),
        absmax.new_empty(1, dtype=torch.float32),
    )


def _dequantize_fake(
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
    return codes.new_empty((rows, columns), dtype=dtype)


def _quantize_cost(weight: torch.Tensor, kind: str, block_size: int, cuda: bool) -> Cost:
    numel = weight.numel()
    written = (numel + 1) // 2 + 4 * ceil_div(numel, block_size)
    # Magnitude, maximum, product, and four comparisons that find one of 16.
    return Cost(flops=7 * numel, read=nbytes(weight), written=written)


def _quantize_absmax_cost(absmax: torch.Tensor, cuda: bool) -> Cost:
    count = absmax.numel()
    # Mean, difference, magnitude, maximum, product, and eight comparisons.
    return Cost(
        flops=13 * count, read=nbytes(absmax), written=count + 4 * ceil_div(count, GROUP) + 4
    )


def _dequantize_cost(
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
) -> Cost:
    numel = rows * columns
    return Cost(
        flops=numel + (0 if absmax2 is None else 2 * absmax.numel()),
        read=nbytes(codes, absmax, absmax2, offset),
        written=numel * dtype.itemsize,
    )


def _quantize_arguments(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, str, int, bool]:
    weight = torch.randn(shape.ffn, shape.hidden, dtype=dtype, device=device)
    return weight, "nf4", BLOCK_SIZE, True


def _quantize_absmax_arguments(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, bool]:
    return 2 + torch.rand(_blocks(shape), device=device), True


def _dequantize_arguments(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, str, int, int, torch.dtype
]:
    blocks = _blocks(shape)
    return (
        _bytes((shape.ffn * shape.hidden + 1) // 2, device),
        _bytes(blocks, device),
        torch.rand(ceil_div(blocks, GROUP), device=device),
        2 + torch.rand(1, device=device),
        shape.ffn,
        shape.hidden,
        "nf4",
        BLOCK_SIZE,
        0,
        dtype,
    )


def _blocks(shape: Shape) -> int:
    return ceil_div(shape.ffn * shape.hidden, BLOCK_SIZE)


def _bytes(count: int, device: torch.device) -> torch.Tensor:
    return torch.randint(256, (count,), dtype=torch.uint8, device=device)


quantize = define(
    "quantize_4bit(Tensor weight, str kind, int block_size, bool cuda) -> (Tensor, Tensor)",
    reference=reference.quantize_4bit,
    triton="dtune_kernels.fourbit.triton:quantize_4bit",
    fake=_quantize_fake,
    cost=_quantize_cost,
    arguments=_quantize_arguments,
    source=SOURCE,
)
quantize_absmax = define(
    "quantize_absmax(Tensor absmax, bool cuda) -> (Tensor, Tensor, Tensor)",
    reference=reference.quantize_absmax,
    triton="dtune_kernels.fourbit.triton:quantize_absmax",
    fake=_quantize_absmax_fake,
    cost=_quantize_absmax_cost,
    arguments=_quantize_absmax_arguments,
    source=SOURCE,
)
dequantize = define(
    "dequantize_4bit(Tensor codes, Tensor absmax, Tensor? absmax2, Tensor? offset, SymInt rows,"
    " SymInt columns, str kind, int block_size, int first, ScalarType dtype) -> Tensor",
    reference=reference.dequantize_4bit,
    triton="dtune_kernels.fourbit.triton:dequantize_4bit",
    fake=_dequantize_fake,
    cost=_dequantize_cost,
    arguments=_dequantize_arguments,
    source=SOURCE,
)
