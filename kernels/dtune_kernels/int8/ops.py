"""The ops of 8-bit weights: schemas, fakes, costs."""

from __future__ import annotations

import torch

from dtune_kernels.int8 import reference
from dtune_kernels.library import Cost, Shape, define, nbytes

SOURCE = (
    "Dettmers et al. 2022, arXiv:2208.07339, section 2.1;"
    " bitsandbytes.functional.int8_vectorwise_quant, int8_vectorwise_dequant"
)


def _quantize_fake(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        weight.new_empty(weight.shape, dtype=torch.int8),
        weight.new_empty(weight.shape[0], dtype=torch.float32),
    )


def _dequantize_fake(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _quantize_cost(weight: torch.Tensor) -> Cost:
    numel, rows = weight.numel(), weight.shape[0]
    # Magnitude, maximum, product, rounding.
    return Cost(flops=4 * numel, read=nbytes(weight), written=numel + 4 * rows)


def _dequantize_cost(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> Cost:
    numel = codes.numel()
    return Cost(flops=2 * numel, read=nbytes(codes, absmax), written=numel * dtype.itemsize)


def _quantize_arguments(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor]:
    return (torch.randn(shape.ffn, shape.hidden, dtype=dtype, device=device),)


def _dequantize_arguments(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.dtype]:
    size = (shape.ffn, shape.hidden)
    codes = torch.randint(-127, 128, size, dtype=torch.int8, device=device)
    return codes, 2 + torch.rand(shape.ffn, device=device), dtype


quantize = define(
    "quantize_int8(Tensor weight) -> (Tensor, Tensor)",
    reference=reference.quantize_int8,
    triton="dtune_kernels.int8.triton:quantize_int8",
    fake=_quantize_fake,
    cost=_quantize_cost,
    arguments=_quantize_arguments,
    source=SOURCE,
)
dequantize = define(
    "dequantize_int8(Tensor codes, Tensor absmax, ScalarType dtype) -> Tensor",
    reference=reference.dequantize_int8,
    triton="dtune_kernels.int8.triton:dequantize_int8",
    fake=_dequantize_fake,
    cost=_dequantize_cost,
    arguments=_dequantize_arguments,
    source=SOURCE,
)
