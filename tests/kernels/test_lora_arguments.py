"""Arguments of the LoRA functions that do not fit are named before anything runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dtune_kernels.errors import KernelArgumentError
from dtune_kernels.lora import Adapter, Norm, lora_linears

from tests.kernels.lora_cases import EPS, linear

BAD = {
    r"linears is none, wanted at least one": lambda one: [],
    r"linears\[0\].weight is a trained weight": lambda one: [
        replace(one, weight=one.weight.clone().requires_grad_())
    ],
    r"shape of linears\[1\].weight is \[24, 35\], wanted \[any, 36\]": lambda one: [
        one,
        replace(one, weight=torch.zeros(24, 35)),
    ],
    r"shape of linears\[0\].bias is \[23\]": lambda one: [replace(one, bias=torch.zeros(23))],
    r"shape of linears\[0\].adapters\[0\].a is \[4, 3\]": lambda one: [
        replace(one, adapters=(Adapter(torch.zeros(4, 3), torch.zeros(24, 4), 1.0),))
    ],
    r"shape of linears\[0\].adapters\[0\].b is \[24, 5\], wanted \[24, 4\]": lambda one: [
        replace(one, adapters=(Adapter(torch.zeros(4, 36), torch.zeros(24, 5), 1.0),))
    ],
    r"shape of linears\[0\].adapters\[0\].a is \[0, 36\]": lambda one: [
        replace(one, adapters=(Adapter(torch.zeros(0, 36), torch.zeros(24, 0), 1.0),))
    ],
    r"linears\[0\].adapters\[0\].dropout is 1.0": lambda one: [
        replace(one, adapters=(replace(one.adapters[0], dropout=1.0),))
    ],
    r"dtype of linears\[0\].weight is torch.int8": lambda one: [
        replace(one, weight=one.weight.to(torch.int8))
    ],
    r"device of linears\[0\].weight is meta, wanted cpu": lambda one: [
        replace(one, weight=one.weight.to("meta"))
    ],
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_named(message: str) -> None:
    one = linear(24, 36, (4,))
    with pytest.raises(KernelArgumentError, match=f"lora_linears: {message}"):
        lora_linears(torch.zeros(2, 36), BAD[message](one))


def test_a_norm_that_does_not_fit_is_named() -> None:
    norm = Norm(torch.ones(5), EPS, False)
    with pytest.raises(KernelArgumentError, match=r"shape of norm.weight is \[5\], wanted \[36\]"):
        lora_linears(torch.zeros(2, 36), [linear(24, 36)], norm=norm)
