"""4-bit weights: bit for bit what bitsandbytes keeps and what it makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from dtune_kernels.errors import KernelArgumentError
from dtune_kernels.fourbit import (
    BLOCK_SIZES,
    FourBitWeight,
    fp4_dequantize,
    fp4_quantize,
    nf4_dequantize,
    nf4_quantize,
)
from dtune_kernels.launch import recorded
from dtune_kernels.weights import QuantizedWeight

from tests.kernels.compare import triton_on_cpu

QUANTIZE = {"nf4": nf4_quantize, "fp4": fp4_quantize}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Triton's bf16 waits for a GPU: the interpreter computes it wrongly.
BACKENDS = [("reference", x) for x in DTYPES] + [("triton", x) for x in DTYPES[:2]]
SHAPES = [(1, 1), (3, 33), (40, 24), (16, 64), (9, 1024), (7, 4097)]
each_kind = pytest.mark.parametrize("kind", ["nf4", "fp4"])
each_backend = pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
on_both = pytest.mark.parametrize("backend", ["reference", "triton"])


def run(backend: str, function: Callable[[], Any]) -> Any:
    if backend == "reference":
        return function()
    with triton_on_cpu():
        return function()


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Also the signs of zeros."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def theirs(
    weight: torch.Tensor, kind: str, block_size: int, double_quant: bool
) -> tuple[torch.Tensor, ...]:
    """Our tensors, made by bitsandbytes."""
    codes, state = bnb.quantize_4bit(
        weight.reshape(-1),
        blocksize=block_size,
        compress_statistics=double_quant,
        quant_type=kind,
    )
    if double_quant:
        return codes.view(-1), state.absmax, state.state2.absmax, state.offset.view(1)
    return codes.view(-1), state.absmax


def their_weight(weight: FourBitWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight, dequantised by bitsandbytes.

    Without its rows: its AVX-512 code takes wrong scales where blocks go on from row to row.
    """
    numel = weight.shape[0] * weight.shape[1]
    shared = {"blocksize": weight.block_size, "quant_type": weight.kind, "dtype": dtype}
    state = bnb.QuantState(absmax=weight.absmax, shape=(numel,), **shared)
    if weight.absmax2 is not None:
        state.offset = weight.offset
        state.state2 = bnb.QuantState(
            absmax=weight.absmax2,
            code=bnb.create_dynamic_map(),
            blocksize=256,
            dtype=torch.float32,
        )
        state.nested = True
    with torch.compiler.set_stance("force_eager"):
        return bnb.dequantize_4bit(weight.codes.view(-1, 1), state).view(weight.shape)


def random_weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal, rows of different sizes, some of zeros only."""
    weight = torch.randn(shape) * torch.rand(shape[0], 1).exp()
    weight[5:8] = 0
    return weight.to(dtype)


def test_tables_are_those_of_bitsandbytes() -> None:
    from dtune_kernels.fourbit.tables import codebook, scale_codebook

    cpu = torch.device("cpu")
    for kind in ("nf4", "fp4"):
        assert same_bits(codebook(kind, False, cpu).values, bnb.get_4bit_type(kind, device="cpu"))
    assert same_bits(scale_codebook(cpu).values, bnb.create_dynamic_map())


@each_backend
@each_kind
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantised_as_bitsandbytes(
    shape: tuple[int, int], double_quant: bool, kind: str, backend: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = random_weight(shape, dtype)
    for block_size in (32, 64, 4096):
        options = {"block_size": block_size, "double_quant": double_quant}
        mine = run(backend, lambda o=options: QUANTIZE[kind](weight, **o)).tensors()
        wanted = theirs(weight, kind, block_size, double_quant)
        assert len(mine) == len(wanted)
        assert all(same_bits(x, y) for x, y in zip(mine, wanted, strict=True))
        if weight.numel() > 1:
            swapped = (mine[0] >> 4) | (mine[0] << 4)
            assert not same_bits(swapped, wanted[0]), "swapped halves would pass"
        if not double_quant:
            assert not same_bits(mine[1] * (1 + 2**-23), wanted[1]), "an ulp would pass"


@on_both
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size_is_quantised_as_bitsandbytes(block_size: int, backend: str) -> None:
    torch.manual_seed(0)
    weight = random_weight((10, 2048))
    mine = run(backend, lambda: nf4_quantize(weight, block_size=block_size, double_quant=True))
    wanted = theirs(weight, "nf4", block_size, True)
    assert all(same_bits(x, y) for x, y in zip(mine.tensors(), wanted, strict=True))


@on_both
def test_any_strides_are_quantised(backend: str) -> None:
    torch.manual_seed(0)
    weight = random_weight((64, 24))
    for strided in (weight.t(), weight[:, ::2], weight[:1].expand(8, 24)):
        mine = run(backend, lambda w=strided: nf4_quantize(w))
        assert same_bits(mine.codes, nf4_quantize(strided.contiguous()).codes)


@each_backend
@each_kind
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantised_as_bitsandbytes(
    shape: tuple[int, int], double_quant: bool, kind: str, backend: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    for block_size in (32, 64, 4096):
        weight = QUANTIZE[kind](
            random_weight(shape), block_size=block_size, double_quant=double_quant
        )
        mine = run(backend, lambda w=weight: w.dequantize(dtype))
        wanted = their_weight(weight, dtype)
        if kind == "fp4":
            # Its code 8 is 0 to bitsandbytes' table and AVX-512 code, -0 to the rest of it.
            mine, wanted = mine + 0.0, wanted + 0.0
        assert same_bits(mine, wanted)
        # A scale that is off by one in 8 bits of mantissa.
        assert not same_bits((mine.float() * (1 + 2**-7)).to(dtype), wanted)


def scales_of_all_codes(offset: float, block_size: int) -> FourBitWeight:
    """Every code of a scale with every code of an element, in groups of different scales."""
    torch.manual_seed(0)
    absmax = torch.cat([torch.randperm(256) for _ in range(3)])[:700].to(torch.uint8)
    codes = torch.randint(256, (700 * block_size // 2,)).to(torch.uint8)
    return FourBitWeight(
        (700, block_size), "nf4", block_size, codes, absmax,
        absmax2=torch.rand(3) + 0.1, offset=torch.tensor([offset]),
    )  # fmt: skip


@each_backend
@pytest.mark.parametrize("offset", [0.7310586, -0.3141593, 0.0])
@pytest.mark.parametrize("block_size", [32, 128])
def test_all_codes_of_scales_are_dequantised_as_bitsandbytes(
    block_size: int, offset: float, backend: str, dtype: torch.dtype
) -> None:
    weight = scales_of_all_codes(offset, block_size)
    mine = run(backend, lambda: weight.dequantize(dtype))
    assert same_bits(mine, their_weight(weight, dtype))


def test_a_product_fused_with_the_sum_would_be_seen() -> None:
    weight = scales_of_all_codes(0.7310586, 32)
    assert weight.absmax2 is not None
    assert weight.offset is not None
    absmax2 = weight.absmax2.repeat_interleave(256)[:700].double()
    table = bnb.create_dynamic_map().double()
    # Exact in fp64, rounded once.
    fused = (table[weight.absmax.int()] * absmax2 + weight.offset.double()).float()
    wrong = FourBitWeight(weight.shape, "nf4", 32, weight.codes, fused)
    assert not same_bits(wrong.dequantize(torch.float32), their_weight(weight, torch.float32))
    assert torch.allclose(wrong.dequantize(torch.float32), weight.dequantize(torch.float32))


@on_both
def test_dequantised_to_fp64_is_what_fp32_is(backend: str) -> None:
    weight = scales_of_all_codes(0.5, 32)
    mine = run(backend, lambda: weight.dequantize(torch.float64))
    assert same_bits(mine, weight.dequantize(torch.float32).double())


@on_both
@pytest.mark.parametrize("double_quant", [False, True])
def test_rows_are_dequantised_alone(double_quant: bool, backend: str) -> None:
    torch.manual_seed(0)
    weight = nf4_quantize(torch.randn(300, 128), double_quant=double_quant)
    whole = weight.dequantize(torch.float32)
    for start, stop in ((0, 300), (1, 2), (130, 300), (250, 256), (300, 300)):
        part = weight.rows(start, stop)
        mine = run(backend, lambda w=part: w.dequantize(torch.float32))
        assert same_bits(mine, whole[start:stop])
        # Views of views: the group that the first scale lies in goes along.
        inner = part.rows((stop - start) // 2, stop - start)
        assert same_bits(inner.dequantize(torch.float32), whole[(start + stop) // 2 : stop])
    if double_quant:
        assert weight.rows(130, 300).first == 4


@on_both
def test_codes_may_begin_anywhere_in_a_buffer(backend: str) -> None:
    torch.manual_seed(0)
    weight = nf4_quantize(torch.randn(64, 256), double_quant=True)
    wanted = weight.dequantize(torch.float32)
    for offset in (1, 4, 16):
        buffer = torch.zeros(weight.codes.numel() + offset, dtype=torch.uint8)
        buffer[offset:] = weight.codes
        moved = weight.with_tensors((buffer[offset:], *weight.tensors()[1:]))
        assert same_bits(run(backend, lambda w=moved: w.dequantize(torch.float32)), wanted)


@on_both
@each_kind
def test_nothing_is_quantised_to_nothing(kind: str, backend: str) -> None:
    for double_quant in (False, True):
        weight = run(
            backend, lambda d=double_quant: QUANTIZE[kind](torch.ones(0, 8), double_quant=d)
        )
        assert weight.codes.numel() == weight.absmax.numel() == 0
        assert run(backend, lambda w=weight: w.dequantize(torch.float16)).shape == (0, 8)


@on_both
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(poison: float, backend: str) -> None:
    weight = torch.ones(4, 64)
    weight[1, 3] = poison
    plain = run(backend, lambda: nf4_quantize(weight).dequantize(torch.float32))
    assert not plain[1].isfinite().any()
    assert torch.equal(plain[[0, 2, 3]], weight[[0, 2, 3]])
    double = run(backend, lambda: nf4_quantize(weight, double_quant=True).dequantize(torch.float32))
    assert not double.isfinite().any()


def test_one_launch_for_each_level_and_one_back() -> None:
    weight = torch.empty(128, 4096, dtype=torch.bfloat16, device="meta")
    from dtune_kernels.catalog import CATALOG

    with recorded() as launches:
        codes, absmax = CATALOG["quantize_4bit"].triton(weight, "nf4", 64, True)
        assert len(launches) == 1
        nested = CATALOG["quantize_absmax"].triton(absmax, False)
        assert len(launches) == 2
        rest = (128, 4096, "nf4", 64, 0, torch.bfloat16)
        CATALOG["dequantize_4bit"].triton(codes, *nested, *rest)
        assert len(launches) == 3
        CATALOG["dequantize_4bit"].triton(codes, absmax, None, None, *rest)
        assert len(launches) == 4


def test_it_is_a_quantised_weight() -> None:
    for double_quant, count in ((False, 2), (True, 4)):
        weight: QuantizedWeight = nf4_quantize(torch.randn(8, 64), double_quant=double_quant)
        tensors = weight.tensors()
        assert len(tensors) == count
        again = weight.with_tensors(tuple(x.clone() for x in tensors))
        assert again.shape == weight.shape == (8, 64)
        assert same_bits(again.dequantize(torch.float32), weight.dequantize(torch.float32))


def test_what_does_not_fit_is_named() -> None:
    weight = nf4_quantize(torch.randn(8, 96))
    with pytest.raises(KernelArgumentError, match=r"nf4_quantize: shape of weight is \[8\]"):
        nf4_quantize(torch.zeros(8))
    with pytest.raises(
        KernelArgumentError, match=r"fp4_quantize: dtype of weight is torch.float64"
    ):
        fp4_quantize(torch.zeros(8, 8, dtype=torch.float64))
    with pytest.raises(KernelArgumentError, match=r"nf4_quantize: block_size is 48, wanted \(32"):
        nf4_quantize(torch.zeros(8, 8), block_size=48)
    with pytest.raises(KernelArgumentError, match=r"nf4_dequantize: kind is fp4, wanted nf4"):
        nf4_dequantize(fp4_quantize(torch.zeros(8, 8)), torch.float32)
    with pytest.raises(KernelArgumentError, match=r"fp4_dequantize: kind is nf4, wanted fp4"):
        fp4_dequantize(weight, torch.float32)
    with pytest.raises(KernelArgumentError, match=r"dequantize_4bit: dtype is torch.int8"):
        weight.dequantize(torch.int8)
    with pytest.raises(
        KernelArgumentError, match=r"dequantize_4bit: elements before the rows is 96"
    ):
        weight.rows(1, 2)
    with pytest.raises(KernelArgumentError, match=r"dequantize_4bit: rows is \(3, 9\)"):
        weight.rows(3, 9)
    with pytest.raises(KernelArgumentError, match=r"dequantize_4bit: tensors is 1, wanted 2"):
        weight.with_tensors((weight.codes,))
    short = weight.with_tensors((weight.codes[1:], weight.absmax))
    with pytest.raises(KernelArgumentError, match=r"number of codes is 383, wanted 384"):
        short.dequantize(torch.float32)
    wide = weight.with_tensors((weight.codes, weight.absmax.double()))
    with pytest.raises(KernelArgumentError, match=r"dtype of absmax is torch.float64, wanted"):
        wide.dequantize(torch.float32)
