"""LoRA on a quantised weight computes what peft computes over bitsandbytes' layers."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from dtune_kernels.fourbit import fp4_quantize, nf4_quantize
from dtune_kernels.int8 import int8_quantize
from dtune_kernels.lora import Adapter, Linear, lora_linear
from dtune_kernels.weights import QuantizedWeight
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.kernels.compare import assert_parity

INPUTS, OUTPUTS, RANK = 128, 64, 8
SCALE = 2.0


def over_bitsandbytes(kind: str, weight: torch.Tensor, *, double_quant: bool) -> PeftModel:
    """peft's LoRA on bitsandbytes' linear with this weight, B drawn at random."""
    if kind == "int8":
        linear: nn.Module = bnb.nn.Linear8bitLt(INPUTS, OUTPUTS, bias=False, has_fp16_weights=False)
        linear.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False)
    else:
        linear = bnb.nn.Linear4bit(
            INPUTS, OUTPUTS, bias=False, quant_type=kind, compress_statistics=double_quant
        )
        linear.weight = bnb.nn.Params4bit(
            weight.clone(),
            requires_grad=False,
            quant_type=kind,
            compress_statistics=double_quant,
            blocksize=64,
        )
    config = LoraConfig(r=RANK, lora_alpha=int(SCALE * RANK), target_modules=["0"])
    base = nn.Sequential(linear.to("cpu"))
    # What transformers sets, and peft asks for.
    base.is_loaded_in_8bit, base.is_loaded_in_4bit = kind == "int8", kind != "int8"
    model = get_peft_model(base, config)
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight, std=0.1)
    return model


def step(y: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(2)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.randn(y.shape).to(y.dtype))]


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(kind: str, double_quant: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS) / INPUTS**0.5
    model = over_bitsandbytes(kind, weight, double_quant=double_quant)
    quantize = nf4_quantize if kind == "nf4" else fp4_quantize
    kept: QuantizedWeight = quantize(weight, block_size=64, double_quant=double_quant)
    layer = model.base_model.model[0]
    assert type(layer).__name__ == "Linear4bit"
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(7, INPUTS, requires_grad=True)
    theirs = step(model(x), [x, a, b])
    mine = step(lora_linear(x, Linear(kept, None, (Adapter(a, b, SCALE),))), [x, a, b])
    wide = [each.detach().double().requires_grad_() for each in (x, a, b)]
    dense = kept.dequantize(torch.float32).double()
    exact = step(wide[0] @ (dense + SCALE * wide[2] @ wide[1]).t(), wide)
    for got, wanted, other in zip(mine, exact, theirs, strict=True):
        assert_parity(got, wanted, other)


def test_eight_bits() -> None:
    """The same bytes, but for x, which LLM.int8 rounds to 8 bits as well and ours does not."""
    torch.manual_seed(0)
    # bitsandbytes takes 16 bits.
    weight = (torch.randn(OUTPUTS, INPUTS) / INPUTS**0.5).half().float()
    model = over_bitsandbytes("int8", weight, double_quant=False)
    layer = model.base_model.model[0]
    assert type(layer).__name__ == "Linear8bitLt"
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    kept = int8_quantize(weight)
    x = torch.randn(7, INPUTS)
    with torch.no_grad():
        theirs = model(x)
        mine = lora_linear(x, Linear(kept, None, (Adapter(a, b, SCALE),)))
        dense = kept.dequantize(torch.float32)
        plain = x @ dense.t() + SCALE * (x @ a.t()) @ b.t()
        exact = x.double() @ (dense.double() + SCALE * b.double() @ a.double()).t()
    assert torch.equal(layer.base_layer.weight, kept.codes)
    assert_parity(mine, exact, plain)
    # A row's largest element is 127 steps, so that each is off by 1 / 254 of it at most.
    assert (mine - theirs).norm() < (x.abs().amax(1).max() / 254) / x.std() * theirs.norm()
