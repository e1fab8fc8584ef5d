"""Weights of 8 bits, each row scaled by its largest magnitude, as LLM.int8 keeps them."""

from dtune_kernels.int8.weight import Int8Weight, int8_dequantize, int8_quantize

__all__ = ["Int8Weight", "int8_dequantize", "int8_quantize"]
