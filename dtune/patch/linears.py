"""Linears of a model as the kernels take them."""

from __future__ import annotations

from dataclasses import replace

from dtune_kernels.lora import Adapter, Linear
from torch import nn

from dtune.peft.dora import DoraLinear
from dtune.peft.lora import LoraLinear
from dtune.types import QuantizedLinearLike


def why_not(module: nn.Module) -> str:
    """Why the LoRA kernels cannot take a module into a group; empty if they can."""
    if isinstance(module, DoraLinear):
        return "DoRA scales the rows of each linear by itself: see the patch dora_linear"
    return why_not_base(module.base if type(module) is LoraLinear else module)


def why_not_base(base: nn.Module) -> str:
    """Why the kernels cannot take a linear without adapter; empty if they can."""
    if isinstance(base, QuantizedLinearLike):
        return ""
    if type(base) is not nn.Linear:
        return f"{type(base).__name__} is no linear that the kernels know"
    if base.weight.requires_grad:
        return "its base weight is trained"
    return ""


def is_adapted(module: nn.Module) -> bool:
    """Whether a linear has an adapter of LoRA, or of what only scales it in another way."""
    return isinstance(module, LoraLinear)


def linear_of(module: nn.Module) -> Linear:
    """A linear that ``why_not`` has nothing against; a DoRA linear without its magnitude."""
    if isinstance(module, LoraLinear):
        dropout = module.dropout if module.training else 0.0
        adapter = Adapter(module.lora_A, module.lora_B, module.scale, dropout)
        return replace(linear_of(module.base), adapters=(adapter,))
    if isinstance(module, nn.Linear):
        return Linear(module.weight, module.bias)
    assert isinstance(module, QuantizedLinearLike), type(module)
    return Linear(module.frozen_weight(), module.bias)
