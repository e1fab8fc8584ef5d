"""Linears with a LoRA adapter that are in no group."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dtune.patch.base import Change, Found, Kept, Stage, kind_of, patch, replace_forward
from dtune.patch.fused import Fused, FusedLinears, add_fused
from dtune.patch.linears import is_adapted, why_not
from dtune.peft.dora import DoraLinear
from dtune.types import ModelSpec


def _fused(self: Any, x: torch.Tensor) -> torch.Tensor:
    (y,) = self.dtune_fused(x)
    result: torch.Tensor = y
    return result


@patch(Stage.modules)
def plan(model: nn.Module, spec: ModelSpec, enabled: frozenset[str]) -> Found:
    """Every adapted linear whose base is frozen, unless a group computes it."""
    found = Found()
    grouped = {
        id(linear)
        for module in model.modules()
        if isinstance(module, Fused)
        for linear in module.linears
    }
    for path, module in model.named_modules():
        if not is_adapted(module) or id(module) in grouped or isinstance(module, DoraLinear):
            continue
        before, reason = kind_of(module), why_not(module)
        if reason:
            found.kept.append(Kept(path, before, reason))
            continue

        def apply(module: nn.Module = module) -> None:
            add_fused(module, FusedLinears([module], None))
            replace_forward(module, _fused, after="FusedLoraLinear")

        found.changes.append(Change(path, before, "FusedLoraLinear", apply))
    return found
