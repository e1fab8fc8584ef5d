"""The LoRA functions compute what peft's layers compute."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from dtune_kernels.fourbit import nf4_quantize
from dtune_kernels.int8 import int8_quantize
from dtune_kernels.lora import Adapter, Linear, lora_linear
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from tests.kernels.compare import assert_parity, triton_on_cpu

INPUTS, OUTPUTS, RANK, ALPHA = 36, 24, 8, 20
ROWS = 19


def peft_layer(dtype: torch.dtype, *, rslora: bool = False, dropout: float = 0.0) -> PeftLinear:
    torch.manual_seed(0)
    layer = PeftLinear(
        nn.Linear(INPUTS, OUTPUTS, dtype=dtype),
        "default",
        LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=rslora, lora_dropout=dropout),
        r=RANK,
        lora_alpha=ALPHA,
    ).to(dtype)
    nn.init.normal_(layer.lora_B["default"].weight)
    layer.base_layer.weight.requires_grad_(False)
    return layer


def ours(layer: PeftLinear) -> Linear:
    rate = layer.lora_dropout["default"]
    adapter = Adapter(
        layer.lora_A["default"].weight,
        layer.lora_B["default"].weight,
        layer.scaling["default"],
        rate.p if isinstance(rate, nn.Dropout) else 0.0,
    )
    return Linear(layer.base_layer.weight, layer.base_layer.bias, (adapter,))


def results(layer: PeftLinear, dtype: torch.dtype, *, peft: bool) -> list[torch.Tensor]:
    """The result and the gradients of x, the bias, A and B."""
    torch.manual_seed(1)
    x = torch.randn(ROWS, INPUTS, dtype=dtype, requires_grad=True)
    dy = torch.randn(ROWS, OUTPUTS, dtype=dtype)
    one = ours(layer)
    y = layer(x) if peft else lora_linear(x, one)
    a, b = one.adapters[0].a, one.adapters[0].b
    assert one.bias is not None
    return [y.detach(), *torch.autograd.grad(y, [x, one.bias, a, b], dy)]


@pytest.mark.parametrize("rslora", [False, True])
def test_equal_in_fp64(rslora: bool) -> None:
    layer = peft_layer(torch.float64, rslora=rslora)
    expected = ALPHA / (RANK**0.5 if rslora else RANK)
    assert ours(layer).adapters[0].scale == expected
    mine, theirs = (results(layer, torch.float64, peft=peft) for peft in (False, True))
    for got, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("rslora", [False, True])
def test_as_near_in_fp32(rslora: bool, backend: str) -> None:
    layer = peft_layer(torch.float32, rslora=rslora)
    theirs = results(layer, torch.float32, peft=True)
    if backend == "triton":
        with triton_on_cpu():
            mine = results(layer, torch.float32, peft=False)
    else:
        mine = results(layer, torch.float32, peft=False)
    exact = in_fp64(layer)
    for got, wanted, other in zip(mine, exact, theirs, strict=True):
        assert_parity(got, wanted, other)


def in_fp64(layer: PeftLinear) -> list[torch.Tensor]:
    """``results`` of the same values, computed by peft in fp64."""
    torch.manual_seed(1)
    x = torch.randn(ROWS, INPUTS).double().requires_grad_()
    dy = torch.randn(ROWS, OUTPUTS).double()
    layer = layer.double()
    one = ours(layer)
    y = layer(x)
    assert one.bias is not None
    wanted = [x, one.bias, one.adapters[0].a, one.adapters[0].b]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def test_dropout_has_the_distribution_of_pefts() -> None:
    layer = peft_layer(torch.float64, dropout=0.3)
    x = torch.randn(1, INPUTS, dtype=torch.double).expand(20000, INPUTS)
    with torch.no_grad():
        theirs, mine = layer(x), lora_linear(x, ours(layer))
    error = (theirs.var(0) / len(x)).sqrt()
    assert ((theirs.mean(0) - mine.mean(0)).abs() < 5 * 2**0.5 * error).all()
    # The variance of a variance of about normal samples is 2 / n.
    assert ((mine.var(0) / theirs.var(0) - 1).abs() < 5 * (4 / len(x)) ** 0.5 * 1.5).all()


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_weight_of_few_bits_is_one_that_was_dequantized_before(kind: str, backend: str) -> None:
    torch.manual_seed(0)
    dense = torch.randn(64, 128) / 128**0.5
    weight = int8_quantize(dense) if kind == "int8" else nf4_quantize(dense, double_quant=True)
    adapter = Adapter(torch.randn(4, 128), torch.randn(64, 4), 2.0)
    x, dy = torch.randn(5, 128), torch.randn(5, 64)

    def run(linear: Linear) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        y = lora_linear(leaf, linear)
        return [y.detach(), *torch.autograd.grad(y, [leaf], dy)]

    dense = weight.dequantize(torch.float32)
    with triton_on_cpu() if backend == "triton" else nullcontext():
        got, expected = (run(Linear(kept, None, (adapter,))) for kept in (weight, dense))
    for mine, wanted in zip(got, expected, strict=True):
        assert torch.equal(mine, wanted)
