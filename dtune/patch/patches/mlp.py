"""Gated MLPs: with LoRA, norm and activation in one group, or the activation alone."""

from __future__ import annotations

from typing import Any

import torch
from dtune_kernels.glu import glu
from torch import nn
from transformers.activations import GELUTanh

from dtune.patch.base import Change, Found, Kept, Stage, kind_of, patch, replace_forward
from dtune.patch.families import family_of
from dtune.patch.folding import find_norms, fold
from dtune.patch.fused import FoldedNorm, FusedMlp, add_fused
from dtune.patch.linears import is_adapted, why_not
from dtune.types import ModelSpec

LINEARS = ("gate_proj", "up_proj", "down_proj")


def _grouped(self: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = self.dtune_fused(x)
    return y


def _activated(self: Any, x: torch.Tensor) -> torch.Tensor:
    activation = activation_of(self.act_fn)
    y: torch.Tensor = self.down_proj(glu(self.gate_proj(x), self.up_proj(x), activation))
    return y


def _activated_halves(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
    y: torch.Tensor = self.down_proj(glu(gate, up, activation_of(self.activation_fn)))
    return y


def activation_of(module: nn.Module) -> str:
    """Name by which the kernels know an activation; empty if they do not."""
    if isinstance(module, nn.SiLU):
        return "silu"
    if isinstance(module, GELUTanh):
        return "gelu_tanh"
    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if type(module).__name__ == "SiLUActivation":
        return "silu"
    if type(module).__name__ == "GELUActivation":
        return "gelu"
    return ""


@patch(Stage.groups)
def plan(model: nn.Module, spec: ModelSpec, enabled: frozenset[str]) -> Found:
    """MLPs of known families."""
    found = Found()
    norms = find_norms(model, "mlp") if "rms_norm" in enabled else {}
    for path, module in model.named_modules():
        if family_of(module, "MLP"):
            _plan_one(path, module, norms.get(id(module)), found)
    return found


def _plan_one(path: str, module: nn.Module, norm: FoldedNorm | None, found: Found) -> None:
    before = kind_of(module)
    halves = "gate_up_proj" in module._modules
    activation = module.get_submodule("activation_fn" if halves else "act_fn")
    name = activation_of(activation)
    if not name:
        reason = f"its activation {type(activation).__name__} is not known"
        found.kept.append(Kept(path, before, reason))
        return
    if halves:
        found.changes.append(_activation_only(path, module, _activated_halves))
        return
    linears = [module.get_submodule(linear) for linear in LINEARS]
    reason = next(filter(None, map(why_not, linears)), "")
    if reason or not any(map(is_adapted, linears)):
        found.changes.append(_activation_only(path, module, _activated))
        return

    def apply() -> None:
        add_fused(module, FusedMlp(linears, norm, name))
        fold(norm)
        replace_forward(module, _grouped, after="FusedMLP")

    after = "FusedMLP" if norm is None else "FusedMLP with its norm"
    found.changes.append(Change(path, before, after, apply))


def _activation_only(path: str, module: nn.Module, forward: Any) -> Change:
    after = "MLP with fused activation"
    return Change(
        path,
        kind_of(module),
        after,
        lambda: replace_forward(module, forward, after="ActivatedMLP"),
    )
