"""Patches over bases that are kept as bytes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dtune.patch.apply import apply_patches, unpatch
from dtune.patch.base import patch_names
from dtune.patch.linears import linear_of, why_not
from dtune.peft.lora import LoraLinear
from tests.unit.frozen import in_4_bits
from tests.unit.patched import adapted, largest_difference, train_step


def to_bytes(model: nn.Module) -> int:
    """Keep the linears of the blocks in 4 bits; how many."""
    linears = [
        (parent, name, child)
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and "layers" in path
    ]
    for parent, name, child in linears:
        setattr(parent, name, in_4_bits(child))
    return len(linears)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("name", ["lora", "rslora", "pissa"])
def test_patched_equals_unpatched_over_4_bits(family: str, name: str) -> None:
    model, spec = adapted(family, peft=name, rank=4)
    assert to_bytes(model) == 14
    plain = train_step(model)
    rows = apply_patches(model, patch_names(), spec)
    assert {row.patch for row in rows if row.after == "FusedLoraLinear"} == {"lora_linear"}
    assert {row.patch for row in rows if "Grouped" in row.after} == {"attention"}
    assert {row.patch for row in rows if "FusedMLP" in row.after} == {"mlp"}
    assert all(row.reason == "" for row in rows if row.patch in ("attention", "mlp"))
    # fp32: some hundred roundings of 2^-24 in another order.
    assert largest_difference(train_step(model), plain) < 1e-4
    unpatch(model)
    assert largest_difference(train_step(model), plain) == 0


def test_a_linear_of_bytes_is_taken_as_it_is_at_each_call() -> None:
    base = in_4_bits(nn.Linear(32, 8))
    layer = LoraLinear(base, rank=2, scale=1.0, dropout=0.0)
    assert why_not(layer) == ""
    before = linear_of(layer).weight.dequantize(torch.float32)
    codes = base.codes.data.clone()
    base.codes.data.zero_()
    assert not torch.equal(linear_of(layer).weight.dequantize(torch.float32), before)
    base.codes.data.copy_(codes)
    assert torch.equal(linear_of(layer).weight.dequantize(torch.float32), before)
    assert linear_of(layer).bias is base.bias
    assert len(linear_of(layer).adapters) == 1


def test_other_linears_are_named() -> None:
    assert "is no linear that the kernels know" in why_not(nn.Identity())
