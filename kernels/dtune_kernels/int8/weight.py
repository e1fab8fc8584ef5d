"""A weight kept in 8 bits, and how it is made.

Shape legend: O x K the weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch

from dtune_kernels.checks import FLOATS, check, check_device, check_dtype, check_shape
from dtune_kernels.int8 import ops

FLOATS_16_32 = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A weight [O, K] as LLM.int8 keeps it."""

    shape: tuple[int, int]
    codes: torch.Tensor
    """[O, K], int8, from -127 to 127."""
    absmax: torch.Tensor
    """[O], fp32: the largest magnitude of each row."""

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [O, K], contiguous, newly allocated, by one launch.

        An element is code * absmax, rounded to fp32, times fp32's 1 / 127, rounded to fp32 and then
        to ``dtype``: as bitsandbytes.

        Raises:
            KernelArgumentError: The dtype is no floating one, or the tensors do not fit.
        """
        op = "dequantize_int8"
        check_shape(op, "codes", self.codes, self.shape)
        check_dtype(op, "codes", self.codes, (torch.int8,))
        check_shape(op, "absmax", self.absmax, self.shape[:1])
        check_dtype(op, "absmax", self.absmax, (torch.float32,))
        check_device(op, codes=self.codes, absmax=self.absmax)
        check(dtype in FLOATS, op, "dtype", got=dtype, wanted="a floating dtype")
        weight: torch.Tensor = ops.dequantize(
            self.codes.contiguous(), self.absmax.contiguous(), dtype
        )
        return weight

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return codes and absmax."""
        return self.codes, self.absmax

    def with_tensors(self, tensors: tuple[torch.Tensor, ...]) -> Self:
        """Return the same weight kept in other tensors: codes and absmax."""
        check(len(tensors) == 2, "dequantize_int8", "tensors", got=len(tensors), wanted=2)
        codes, absmax = tensors
        return replace(self, codes=codes, absmax=absmax)

    def rows(self, start: int, stop: int) -> Self:
        """Return rows ``start`` to ``stop`` as a weight; its tensors are views."""
        count, columns = self.shape
        fits = 0 <= start <= stop <= count
        check(fits, "dequantize_int8", "rows", got=(start, stop), wanted=f"0 to {count}")
        return replace(
            self,
            shape=(stop - start, columns),
            codes=self.codes[start:stop],
            absmax=self.absmax[start:stop],
        )


def int8_quantize(weight: torch.Tensor) -> Int8Weight:
    """Quantise each row to integers from -127 to 127, scaled by its largest magnitude.

    The codes are those of bitsandbytes' ``int8_vectorwise_quant`` without outliers, in its CPU
    build and on a GPU too: the element in fp32, times s, rounded to the nearest integer, ties to
    even; s is the reciprocal of absmax, rounded, times 127, rounded. bitsandbytes' CUDA code
    divides 127 by absmax approximately, so that its codes may differ for elements within about an
    ulp of a tie. Rows of zeros, and rows whose s overflows (absmax below 127 / 3.4e38), have codes
    0.

    Args:
        weight: [O, K], any strides, fp32, bf16 or fp16, finite. A row with a NaN or infinity
            becomes NaN.

    Raises:
        KernelArgumentError: The shape or dtype does not fit.

    Dettmers et al. 2022, arXiv:2208.07339, section 2.1.
    """
    check_shape("int8_quantize", "weight", weight, (None, None))
    check_dtype("int8_quantize", "weight", weight, FLOATS_16_32)
    codes, absmax = ops.quantize(weight.detach().contiguous())
    return Int8Weight((weight.shape[0], weight.shape[1]), codes, absmax)


def int8_dequantize(weight: Int8Weight, dtype: torch.dtype) -> torch.Tensor:
    """Return ``weight.dequantize(dtype)``."""
    return weight.dequantize(dtype)
