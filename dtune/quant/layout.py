"""In which bytes a quantised weight is kept, and how any range of them is made.

Every part is a flat uint8 tensor, row-major over the weight, so that a shard of it is a range and
no engine casts it:

- 4 bits: ``codes`` [ceil(N / 2)], the first element in the high half; ``absmax`` fp32 as [4 B];
  with double quantisation ``absmax`` [B] as 8-bit codes, ``absmax2`` fp32 as [4 G], and ``offset``
  fp32 as [4].
- 8 bits: ``codes`` int8 as [N], ``absmax`` fp32 as [4 O].

Shape legend: O x K the weight, N = O * K its elements, B = ceil(N / block) blocks,
G = ceil(B / 256) groups of scales.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch
from dtune_kernels.fourbit import FourBitWeight, fp4_quantize, nf4_quantize
from dtune_kernels.fourbit import ops as fourbit_ops
from dtune_kernels.int8 import Int8Weight, int8_quantize
from dtune_kernels.weights import QuantizedWeight

CODES, ABSMAX, ABSMAX2, OFFSET = "codes", "absmax", "absmax2", "offset"
PARTS = (CODES, ABSMAX, ABSMAX2, OFFSET)
FP32_BYTES = 4
GROUP = 256
"""Scales that share a second-level scale."""

# Elements that are quantised at once: bounds the float copies to some tens of MiB.
PIECE = 1 << 22

_QUANTISED_FROM = (torch.float32, torch.bfloat16, torch.float16)

ReadElements = Callable[[int, int], torch.Tensor]
"""Elements [start, stop) of the flattened float weight: 1-D."""


class Layout(ABC):
    """How a weight [O, K] is kept."""

    shape: tuple[int, int]

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return self.shape[0] * self.shape[1]

    @property
    @abstractmethod
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each part, in the order of the parameters."""

    @abstractmethod
    def weight(self, parts: tuple[torch.Tensor, ...]) -> QuantizedWeight:
        """The weight over its parts, which it shares memory with where they are aligned."""

    @abstractmethod
    def make(self, part: str, start: int, stop: int, maker: Maker) -> torch.Tensor:
        """Bytes [start, stop) of a part, from no more of the weight than they depend on."""

    @abstractmethod
    def restore(self, start: int, stop: int, maker: Maker) -> torch.Tensor:
        """Elements [start, stop) of the weight as the model computes with it: fp32, 1-D."""


@dataclass
class Maker:
    """Reads the float weight of one linear, and remembers the scales that it has found.

    So a weight whose codes were asked for is not read again for its scales.
    """

    read: ReadElements
    device: torch.device
    found: tuple[torch.Tensor, torch.Tensor] | None = None
    """fp32 scales of blocks, and which of them are known."""
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    """Scales of the whole weight in 8 bits, those of their groups, and the offset."""

    def pieces(self, start: int, stop: int, *, multiple: int) -> Iterator[torch.Tensor]:
        """Elements [start, stop) on the device, in pieces that end at multiples of ``multiple``."""
        step = max(1, PIECE // multiple) * multiple
        for begin in range(start, stop, step):
            values = self.read(begin, min(begin + step, stop)).to(self.device)
            yield values if values.dtype in _QUANTISED_FROM else values.float()


@dataclass(frozen=True)
class FourBitLayout(Layout):
    """Blocks of 4-bit codes."""

    shape: tuple[int, int]
    kind: str
    block_size: int
    double: bool

    @property
    def num_blocks(self) -> int:
        """Scales of the weight."""
        return -(-self.numel // self.block_size)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each part."""
        codes, blocks = -(-self.numel // 2), self.num_blocks
        if not self.double:
            return {CODES: codes, ABSMAX: FP32_BYTES * blocks}
        groups = -(-blocks // GROUP)
        return {CODES: codes, ABSMAX: blocks, ABSMAX2: FP32_BYTES * groups, OFFSET: FP32_BYTES}

    def weight(self, parts: tuple[torch.Tensor, ...]) -> QuantizedWeight:
        """The weight over its parts."""
        if not self.double:
            codes, absmax = parts
            return FourBitWeight(self.shape, self.kind, self.block_size, codes, as_floats(absmax))
        codes, absmax, absmax2, offset = parts
        return FourBitWeight(
            self.shape,
            self.kind,
            self.block_size,
            codes,
            absmax,
            as_floats(absmax2),
            as_floats(offset),
        )

    def make(self, part: str, start: int, stop: int, maker: Maker) -> torch.Tensor:
        """Bytes of a part; scales of 8 bits depend on the mean of all and take a whole pass."""
        if part == CODES:
            first, last = self._blocks_of(2 * start, min(2 * stop, self.numel))
            codes = torch.cat([w.codes for w in self._quantized(first, last, maker)])
            skipped = first * self.block_size // 2
            return codes[start - skipped : stop - skipped]
        if self.double:
            whole = dict(zip((ABSMAX, ABSMAX2, OFFSET), self._scales(maker), strict=True))
            return as_bytes(whole[part])[start:stop]
        first, last = start // FP32_BYTES, -(-stop // FP32_BYTES)
        skipped = first * FP32_BYTES
        return as_bytes(self._absmax(first, last, maker))[start - skipped : stop - skipped]

    def restore(self, start: int, stop: int, maker: Maker) -> torch.Tensor:
        """Elements as the model computes with them."""
        first, last = self._blocks_of(start, stop)
        values, at = [], first
        for piece in self._quantized(first, last, maker):
            blocks = piece.absmax.numel()
            kept = self._with_kept_scales(piece, at, maker) if self.double else piece
            values.append(kept.dequantize(torch.float32).reshape(-1))
            at += blocks
        skipped = first * self.block_size
        return torch.cat(values)[start - skipped : stop - skipped]

    def _blocks_of(self, start: int, stop: int) -> tuple[int, int]:
        return start // self.block_size, -(-stop // self.block_size)

    def _quantized(self, first: int, last: int, maker: Maker) -> Iterator[FourBitWeight]:
        """Blocks [first, last) with scales of 32 bits, in pieces; the scales are remembered."""
        quantize = nf4_quantize if self.kind == "nf4" else fp4_quantize
        scales, known = self._found(maker)
        start, stop = first * self.block_size, min(last * self.block_size, self.numel)
        for values in maker.pieces(start, stop, multiple=self.block_size):
            piece = quantize(values.view(1, -1), block_size=self.block_size)
            end = first + piece.absmax.numel()
            scales[first:end], known[first:end] = piece.absmax, True
            first = end
            yield piece

    def _found(self, maker: Maker) -> tuple[torch.Tensor, torch.Tensor]:
        if maker.found is None:
            scales = torch.zeros(self.num_blocks, device=maker.device)
            maker.found = scales, torch.zeros(self.num_blocks, dtype=torch.bool)
        return maker.found

    def _absmax(self, first: int, last: int, maker: Maker) -> torch.Tensor:
        """Scales of blocks [first, last), fp32; reads the blocks that were not asked for before."""
        scales, known = self._found(maker)
        step = max(1, PIECE // self.block_size)
        for begin in range(first, last, step):
            end = min(begin + step, last)
            if not known[begin:end].all():
                for _ in self._quantized(begin, end, maker):
                    pass
        return scales[first:last]

    def _scales(self, maker: Maker) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if maker.nested is None:
            absmax = self._absmax(0, self.num_blocks, maker)
            with _one_thread():
                maker.nested = fourbit_ops.quantize_absmax(absmax, maker.device.type != "cpu")
        return maker.nested

    def _with_kept_scales(self, piece: FourBitWeight, at: int, maker: Maker) -> FourBitWeight:
        """Blocks that begin with block ``at``, with the scales that are kept."""
        absmax, absmax2, offset = self._scales(maker)
        stop, group = at + piece.absmax.numel(), at // GROUP
        return replace(
            piece,
            absmax=absmax[at:stop],
            absmax2=absmax2[group : -(-stop // GROUP)],
            offset=offset,
            first=at - group * GROUP,
        )


@dataclass(frozen=True)
class Int8Layout(Layout):
    """Rows of integers."""

    shape: tuple[int, int]

    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each part."""
        return {CODES: self.numel, ABSMAX: FP32_BYTES * self.shape[0]}

    def weight(self, parts: tuple[torch.Tensor, ...]) -> QuantizedWeight:
        """The weight over its parts."""
        codes, absmax = parts
        return Int8Weight(self.shape, codes.view(torch.int8).view(self.shape), as_floats(absmax))

    def make(self, part: str, start: int, stop: int, maker: Maker) -> torch.Tensor:
        """Bytes of a part."""
        per_row = self.shape[1] if part == CODES else FP32_BYTES
        first, last = start // per_row, -(-stop // per_row)
        made = torch.cat(
            [
                as_bytes(rows.codes if part == CODES else rows.absmax)
                for rows in self._quantized(first, last, maker)
            ]
        )
        return made[start - first * per_row : stop - first * per_row]

    def restore(self, start: int, stop: int, maker: Maker) -> torch.Tensor:
        """Elements as the model computes with them."""
        columns = self.shape[1]
        first, last = start // columns, -(-stop // columns)
        rows = self._quantized(first, last, maker)
        values = torch.cat([w.dequantize(torch.float32).reshape(-1) for w in rows])
        return values[start - first * columns : stop - first * columns]

    def _quantized(self, first: int, last: int, maker: Maker) -> Iterator[Int8Weight]:
        columns = self.shape[1]
        for values in maker.pieces(first * columns, last * columns, multiple=columns):
            yield int8_quantize(values.view(-1, columns))


@dataclass(frozen=True, eq=False)
class ByteWeight:
    """A weight over the byte parameters of a module; ``dtune_kernels.weights.QuantizedWeight``.

    Its tensors are the parameters themselves and not views of them: what autograd keeps is then
    what an engine frees and fetches again.
    """

    layout: Layout
    parts: tuple[torch.Tensor, ...]
    floats: torch.Tensor | None = None
    """The weight [O, K], where it is kept dequantised as well."""

    @property
    def shape(self) -> tuple[int, int]:
        """O, K."""
        return self.layout.shape

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight [O, K], contiguous, not to be written to: it may be the one kept."""
        if self.floats is not None and self.floats.dtype == dtype:
            return self.floats
        return self.layout.weight(self.parts).dequantize(dtype)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Return the parts in the order of the layout."""
        return self.parts

    def with_tensors(self, tensors: tuple[torch.Tensor, ...]) -> Self:
        """Return the same weight over other tensors."""
        return replace(self, parts=tensors)


def as_bytes(values: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as flat uint8."""
    return values.contiguous().reshape(-1).view(torch.uint8)


def as_floats(data: torch.Tensor) -> torch.Tensor:
    """Flat bytes as fp32; copied where they begin at no multiple of four, as gathered ones may."""
    # torch.compile cannot ask; ZeRO-3, which gathers so, does not compile.
    if not torch.compiler.is_compiling() and data.storage_offset() % FP32_BYTES:
        data = data.clone()
    return data.view(torch.float32)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The last bits of a mean of many scales tell how many threads have added them up."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
