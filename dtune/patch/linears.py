"""Linears of a model as the kernels take them."""

from __future__ import annotations

from dataclasses import replace

from dtune_kernels.lora import Adapter, Linear
from torch import nn

from dtune.peft.lora import LoraLinear


def why_not(module: nn.Module) -> str:
    """Why the LoRA kernels cannot take a module; empty if they can."""
    base = module.base if type(module) is LoraLinear else module
    if type(base) is not nn.Linear:
        return f"{type(base).__name__} is no linear that the kernels know"
    if base.weight.requires_grad:
        return "its base weight is trained"
    return ""


def is_adapted(module: nn.Module) -> bool:
    """Whether a linear has an adapter."""
    return isinstance(module, LoraLinear)


def linear_of(module: nn.Module) -> Linear:
    """A linear that ``why_not`` has nothing against."""
    if isinstance(module, LoraLinear):
        dropout = module.dropout if module.training else 0.0
        adapter = Adapter(module.lora_A, module.lora_B, module.scale, dropout)
        return replace(linear_of(module.base), adapters=(adapter,))
    assert isinstance(module, nn.Linear), type(module)
    return Linear(module.weight, module.bias)
