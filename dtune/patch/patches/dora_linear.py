"""Linears with a DoRA adapter."""

from __future__ import annotations

from typing import Any

import torch
from dtune_kernels.dora import dora_linear
from torch import nn

from dtune.patch.base import Change, Found, Kept, Stage, kind_of, patch, replace_forward
from dtune.patch.fused import add_fused
from dtune.patch.linears import linear_of, why_not_base
from dtune.peft.dora import DoraLinear
from dtune.types import ModelSpec


class FusedDora(nn.Module):
    """A DoRA linear that keeps neither its norm's [O, D] tensors nor a dequantised weight."""

    def __init__(self, linear: DoraLinear) -> None:
        super().__init__()
        # In a tuple: it stays a child of its own parent alone.
        self._linear = (linear,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., O]."""
        linear = self._linear[0]
        return dora_linear(x, linear_of(linear), linear.lora_magnitude_vector)


def _fused(self: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = self.dtune_fused(x)
    return y


@patch(Stage.modules)
def plan(model: nn.Module, spec: ModelSpec, enabled: frozenset[str]) -> Found:
    """Every DoRA linear whose base is frozen.

    With dropout the kernels drop only what the adapter reads, which is equal in expectation.
    """
    found = Found()
    for path, module in model.named_modules():
        if not isinstance(module, DoraLinear):
            continue
        before, reason = kind_of(module), why_not_base(module.base)
        if reason:
            found.kept.append(Kept(path, before, reason))
            continue

        def apply(module: DoraLinear = module) -> None:
            add_fused(module, FusedDora(module))
            replace_forward(module, _fused, after="FusedDoraLinear")

        found.changes.append(Change(path, before, "FusedDoraLinear", apply))
    return found
