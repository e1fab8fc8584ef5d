"""8-bit rows: code for code what LLM.int8 keeps, bit for bit what it makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from dtune_kernels.errors import KernelArgumentError
from dtune_kernels.int8 import Int8Weight, int8_dequantize, int8_quantize
from dtune_kernels.weights import QuantizedWeight

from tests.kernels.compare import triton_on_cpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Triton's bf16 waits for a GPU: the interpreter computes it wrongly.
BACKENDS = [("reference", x) for x in DTYPES] + [("triton", x) for x in DTYPES[:2]]
SHAPES = [(1, 1), (3, 33), (9, 1024), (4, 4096), (5, 4097), (2, 9000)]
each_backend = pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
on_both = pytest.mark.parametrize("backend", ["reference", "triton"])
each_shape = pytest.mark.parametrize("shape", SHAPES)


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


@each_backend
@each_shape
def test_quantised_as_llm_int8(shape: tuple[int, int], backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(shape) * torch.rand(shape[0], 1).exp()).to(dtype)
    mine = run(backend, lambda: int8_quantize(weight))
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight)
    assert same_bits(mine.codes, codes)
    assert same_bits(mine.absmax, absmax)
    assert not same_bits(mine.codes - 1, codes), "codes that are off by one would pass"
    assert not same_bits(mine.absmax * (1 + 2**-23), absmax), "an ulp would pass"


@on_both
def test_ties_and_their_neighbours_are_rounded_as_by_llm_int8(backend: str) -> None:
    # absmax is 127 or near it: products at, above and below n + 1/2.
    ties = torch.arange(-127, 127) + 0.5
    rows = [
        torch.cat((torch.tensor([127.0 + 2.0**-17 * i]), ties, ties * (1 + 2.0**-23 * i)))
        for i in range(-8, 9)
    ]
    weight = torch.stack(rows)
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight)
    mine = run(backend, lambda: int8_quantize(weight))
    assert same_bits(mine.codes, codes)
    # The other order, 127 / absmax rounded once, would be seen.
    once = torch.round(weight.double() * (127 / absmax.double()).float().double()[:, None])
    assert not torch.equal(once.to(torch.int8), codes)


@each_backend
@each_shape
def test_dequantised_as_llm_int8(shape: tuple[int, int], backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = int8_quantize(torch.randn(shape))
    mine = run(backend, lambda: weight.dequantize(dtype))
    wide = bnb.int8_vectorwise_dequant(weight.codes, weight.absmax)
    assert same_bits(mine, wide.to(dtype))
    assert not same_bits((mine.float() * (1 + 2**-7)).to(dtype), wide.to(dtype))


@each_backend
def test_all_codes_are_dequantised_as_llm_int8(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    codes = torch.arange(-127, 128).to(torch.int8).expand(64, 255)
    weight = Int8Weight((64, 255), codes, torch.rand(64) + 0.01)
    wide = bnb.int8_vectorwise_dequant(codes, weight.absmax)
    assert same_bits(run(backend, lambda: int8_dequantize(weight, dtype)), wide.to(dtype))
    # The scale of a row rounded first would be seen.
    other = codes * (weight.absmax / 127)[:, None]
    assert not same_bits(other, wide)


@on_both
def test_dequantised_to_fp64_is_what_fp32_is(backend: str) -> None:
    weight = int8_quantize(torch.randn(3, 40))
    mine = run(backend, lambda: weight.dequantize(torch.float64))
    assert same_bits(mine, weight.dequantize(torch.float32).double())


@on_both
def test_rows_of_zeros_stay_zero(backend: str) -> None:
    weight = torch.randn(4, 40)
    weight[1] = 0
    weight[2] *= 1e-38
    mine = run(backend, lambda: int8_quantize(weight))
    assert not mine.codes[1:3].any()
    assert not run(backend, lambda: mine.dequantize(torch.float32))[1:3].any()
    assert mine.codes[0].any()


@on_both
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(poison: float, backend: str) -> None:
    weight = torch.ones(3, 40)
    weight[1, 3] = poison
    mine = run(backend, lambda: int8_quantize(weight).dequantize(torch.float32))
    assert mine[1].isnan().all()
    assert torch.allclose(mine[[0, 2]], weight[[0, 2]])


@on_both
def test_any_strides_are_taken(backend: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 24)
    for strided in (weight.t(), weight[:, ::2], weight[:1].expand(8, 24)):
        mine = run(backend, lambda w=strided: int8_quantize(w))
        assert same_bits(mine.codes, int8_quantize(strided.contiguous()).codes)
    mine = int8_quantize(weight)
    turned = mine.with_tensors((mine.codes.t().contiguous().t(), mine.absmax))
    got = run(backend, lambda: turned.dequantize(torch.float32))
    assert same_bits(got, mine.dequantize(torch.float32))


@on_both
def test_rows_are_dequantised_alone(backend: str) -> None:
    torch.manual_seed(0)
    weight = int8_quantize(torch.randn(9, 40))
    whole = weight.dequantize(torch.float32)
    for start, stop in ((0, 9), (3, 4), (5, 9), (9, 9)):
        part = weight.rows(start, stop)
        mine = run(backend, lambda w=part: w.dequantize(torch.float32))
        assert same_bits(mine, whole[start:stop])


@on_both
@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_nothing_is_quantised_to_nothing(shape: tuple[int, int], backend: str) -> None:
    weight = run(backend, lambda: int8_quantize(torch.ones(shape)))
    assert weight.codes.shape == shape
    assert same_bits(weight.absmax, torch.zeros(shape[0]))
    assert run(backend, lambda: weight.dequantize(torch.float16)).shape == shape


def test_it_is_a_quantised_weight() -> None:
    weight: QuantizedWeight = int8_quantize(torch.randn(8, 64))
    again = weight.with_tensors(tuple(x.clone() for x in weight.tensors()))
    assert again.shape == weight.shape == (8, 64)
    assert same_bits(again.dequantize(torch.float32), weight.dequantize(torch.float32))


def test_what_does_not_fit_is_named() -> None:
    weight = int8_quantize(torch.randn(8, 24))
    with pytest.raises(KernelArgumentError, match=r"int8_quantize: shape of weight is \[8\]"):
        int8_quantize(torch.zeros(8))
    with pytest.raises(KernelArgumentError, match=r"int8_quantize: dtype of weight is torch.int32"):
        int8_quantize(torch.zeros(8, 8, dtype=torch.int32))
    with pytest.raises(KernelArgumentError, match=r"dequantize_int8: dtype is torch.int8, wanted"):
        weight.dequantize(torch.int8)
    with pytest.raises(KernelArgumentError, match=r"dequantize_int8: rows is \(3, 9\)"):
        weight.rows(3, 9)
    with pytest.raises(KernelArgumentError, match=r"dequantize_int8: tensors is 1, wanted 2"):
        weight.with_tensors((weight.codes,))
    with pytest.raises(KernelArgumentError, match=r"shape of absmax is \[7\], wanted \[8\]"):
        weight.with_tensors((weight.codes, weight.absmax[1:])).dequantize(torch.float32)
