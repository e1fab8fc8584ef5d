"""A weight kept in 4 bits, and how it is made.

Shape legend: O x K the weight, N = O * K its elements, B = ceil(N / block) blocks and their scales,
G = ceil(B / 256) groups of scales.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch

from dtune_kernels.checks import FLOATS, check, check_device, check_dtype, check_shape
from dtune_kernels.fourbit import ops
from dtune_kernels.fourbit.tables import GROUP

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOATS_16_32 = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class FourBitWeight:
    """A weight [O, K] in bitsandbytes' format, without padding; blocks go on from row to row."""

    shape: tuple[int, int]
    kind: str
    """``nf4`` or ``fp4``."""
    block_size: int
    codes: torch.Tensor
    """[ceil(N / 2)], uint8: two elements a byte, the first in the high half."""
    absmax: torch.Tensor
    """[B], fp32: the largest magnitude of each block; with ``absmax2``, uint8: its code."""
    absmax2: torch.Tensor | None = None
    """[ceil((first + B) / 256)], fp32: the scale of each group of 256 scales."""
    offset: torch.Tensor | None = None
    """[1], fp32: what was subtracted from each scale before that."""
    first: int = 0
    """Scales that the first group has before this weight's first one."""

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [O, K], contiguous, newly allocated, by one launch.

        An element is codebook[code] * s, rounded to fp32 and then to ``dtype``, where s is absmax
        or round(round(codebook8[absmax] * absmax2) + offset) in fp32.

        Raises:
            KernelArgumentError: The dtype is no floating one, or the tensors do not fit.
        """
        _check_weight(self)
        check(dtype in FLOATS, "dequantize_4bit", "dtype", got=dtype, wanted="a floating dtype")
        rows, columns = self.shape
        weight: torch.Tensor = ops.dequantize(
            self.codes.reshape(-1).contiguous(),
            self.absmax.reshape(-1).contiguous(),
            None if self.absmax2 is None else self.absmax2.contiguous(),
            self.offset,
            rows,
            columns,
            self.kind,
            self.block_size,
            self.first,
            dtype,
        )
        return weight

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return codes and absmax, then absmax2 and offset if there are."""
        kept = (self.codes, self.absmax, self.absmax2, self.offset)
        return tuple(x for x in kept if x is not None)

    def with_tensors(self, tensors: tuple[torch.Tensor, ...]) -> Self:
        """Return the same weight kept in other tensors, as many and in the order of ``tensors``."""
        nested = self.absmax2 is not None
        wanted = 4 if nested else 2
        check(len(tensors) == wanted, "dequantize_4bit", "tensors", got=len(tensors), wanted=wanted)
        codes, absmax = tensors[:2]
        absmax2, offset = tensors[2:] if nested else (None, None)
        return replace(self, codes=codes, absmax=absmax, absmax2=absmax2, offset=offset)

    def rows(self, start: int, stop: int) -> Self:
        """Return rows ``start`` to ``stop`` as a weight; its tensors are views.

        Raises:
            KernelArgumentError: There are no such rows, or a block reaches into the row before.
        """
        op, (count, columns) = "dequantize_4bit", self.shape
        check(0 <= start <= stop <= count, op, "rows", got=(start, stop), wanted=f"0 to {count}")
        begin, end = start * columns, stop * columns
        wanted = f"a multiple of block_size {self.block_size}"
        check(
            begin % self.block_size == 0, op, "elements before the rows", got=begin, wanted=wanted
        )
        blocks = slice(begin // self.block_size, ops.ceil_div(end, self.block_size))
        part = replace(
            self,
            shape=(stop - start, columns),
            codes=self.codes.reshape(-1)[begin // 2 : (end + 1) // 2],
            absmax=self.absmax.reshape(-1)[blocks],
        )
        if self.absmax2 is None:
            return part
        group = (self.first + blocks.start) // GROUP
        groups = slice(group, ops.ceil_div(self.first + blocks.stop, GROUP))
        first = self.first + blocks.start - group * GROUP
        return replace(part, absmax2=self.absmax2[groups], first=first)


def nf4_quantize(
    weight: torch.Tensor, *, block_size: int = 64, double_quant: bool = False
) -> FourBitWeight:
    """Quantise a weight to the 16 quantiles of NormalFloat, each block scaled by its largest.

    The bits are those that bitsandbytes gives on the weight's device; they differ between a CPU and
    a GPU. Its CPU code rounds a scale to a grid of 65536 steps before its 8-bit code is looked up,
    and divides in a last block that is cut short, where its CUDA code multiplies by the reciprocal;
    its CUDA code has rounded midpoints for fp4; the offset is the mean as PyTorch sums it there.
    Two things of the CUDA code are not followed:

    - its reciprocal of absmax is approximate: elements within an ulp or so of a midpoint may get
      the neighbouring code;
    - a block of zeros gets code 0, which nf4 decodes to -absmax: not 0 after double quantisation.
      Here its elements have the code of zero.

    Args:
        weight: [O, K], any strides, fp32, bf16 or fp16. A NaN or infinity shows: its block, and
            with double_quant the whole weight, becomes NaN or infinite.
        block_size: Elements that share a scale: a power of two from 32 to 4096.
        double_quant: Keep the scales in 8 bits, each group of 256 with a scale of its own.

    Raises:
        KernelArgumentError: The shape, dtype or block size does not fit.

    Dettmers et al. 2023, arXiv:2305.14314, section 3.
    """
    return _quantize(weight, "nf4", block_size, double_quant)


def fp4_quantize(
    weight: torch.Tensor, *, block_size: int = 64, double_quant: bool = False
) -> FourBitWeight:
    """Quantise as ``nf4_quantize`` to 4-bit floats: sign, two bits of exponent, one of mantissa."""
    return _quantize(weight, "fp4", block_size, double_quant)


def nf4_dequantize(weight: FourBitWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return ``weight.dequantize(dtype)``; KernelArgumentError unless it is of kind nf4."""
    check(weight.kind == "nf4", "nf4_dequantize", "kind", got=weight.kind, wanted="nf4")
    return weight.dequantize(dtype)


def fp4_dequantize(weight: FourBitWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return ``weight.dequantize(dtype)``; KernelArgumentError unless it is of kind fp4."""
    check(weight.kind == "fp4", "fp4_dequantize", "kind", got=weight.kind, wanted="fp4")
    return weight.dequantize(dtype)


def _quantize(
    weight: torch.Tensor, kind: str, block_size: int, double_quant: bool
) -> FourBitWeight:
    op = f"{kind}_quantize"
    check_shape(op, "weight", weight, (None, None))
    check_dtype(op, "weight", weight, FLOATS_16_32)
    check(block_size in BLOCK_SIZES, op, "block_size", got=block_size, wanted=BLOCK_SIZES)
    rows, columns = weight.shape
    cuda = weight.device.type != "cpu"
    codes, absmax = ops.quantize(weight.detach().contiguous(), kind, block_size, cuda)
    plain = FourBitWeight((rows, columns), kind, block_size, codes, absmax)
    if not double_quant:
        return plain
    absmax8, absmax2, offset = ops.quantize_absmax(absmax, cuda)
    return replace(plain, absmax=absmax8, absmax2=absmax2, offset=offset)


def _check_weight(weight: FourBitWeight) -> None:
    op = "dequantize_4bit"
    numel = weight.shape[0] * weight.shape[1]
    blocks = ops.ceil_div(numel, weight.block_size)
    nested = weight.absmax2 is not None
    check(weight.kind in ("nf4", "fp4"), op, "kind", got=weight.kind, wanted="nf4 or fp4")
    sizes = weight.block_size in BLOCK_SIZES
    check(sizes, op, "block_size", got=weight.block_size, wanted=BLOCK_SIZES)
    check(0 <= weight.first < GROUP, op, "first", got=weight.first, wanted="0 to 255")
    check_dtype(op, "codes", weight.codes, (torch.uint8,))
    check_dtype(op, "absmax", weight.absmax, (torch.uint8 if nested else torch.float32,))
    bytes_wanted = (numel + 1) // 2
    got = weight.codes.numel()
    check(got == bytes_wanted, op, "number of codes", got=got, wanted=bytes_wanted)
    got = weight.absmax.numel()
    check(got == blocks, op, "number of absmax", got=got, wanted=blocks)
    check((weight.offset is not None) == nested, op, "offset", got=weight.offset, wanted="absmax2")
    if weight.absmax2 is not None and weight.offset is not None:
        groups = ops.ceil_div(weight.first + blocks, GROUP)
        check_shape(op, "absmax2", weight.absmax2, (groups,))
        check_dtype(op, "absmax2", weight.absmax2, (torch.float32,))
        check_shape(op, "offset", weight.offset, (1,))
        check_dtype(op, "offset", weight.offset, (torch.float32,))
    check_device(
        op,
        codes=weight.codes,
        absmax=weight.absmax,
        absmax2=weight.absmax2,
        offset=weight.offset,
    )
