"""Weights of 4 bits, NF4 and FP4, in bitsandbytes' format, with scales of 32 or of 8 bits."""

from dtune_kernels.fourbit.weight import (
    BLOCK_SIZES,
    FourBitWeight,
    fp4_dequantize,
    fp4_quantize,
    nf4_dequantize,
    nf4_quantize,
)

__all__ = [
    "BLOCK_SIZES",
    "FourBitWeight",
    "fp4_dequantize",
    "fp4_quantize",
    "nf4_dequantize",
    "nf4_quantize",
]
