"""Rotary embedding of queries and keys in one kernel.

The forward of an attention module calls the function ``apply_rotary_pos_emb`` of its Python
module. A patched module gets the same forward, run with names in which that function is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from dtune_kernels.rope import rope
from torch import nn

from dtune.patch.base import Change, Found, Kept, Stage, kind_of, patch, replace_forward
from dtune.patch.families import family_of
from dtune.types import ModelSpec

CALLED = "apply_rotary_pos_emb"


def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k, [B, H, S, D], by tables cos and sin, [B, S, D], as transformers calls it."""
    assert unsqueeze_dim == 1, unsqueeze_dim
    return rope(q, k, cos, sin)


@cache
def _with_rope(forward: FunctionType) -> Callable[..., Any]:
    names = {**forward.__globals__, CALLED: apply_rotary_pos_emb}
    # torch.compile would look names up in the module of that name, and find transformers' own.
    del names["__name__"]
    rotated = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    rotated.__kwdefaults__ = forward.__kwdefaults__
    return rotated


@patch(Stage.functions)
def plan(model: nn.Module, spec: ModelSpec, enabled: frozenset[str]) -> Found:
    """Attention modules of known families."""
    found = Found()
    for path, module in model.named_modules():
        if not family_of(module, "Attention"):
            continue
        before = kind_of(module)
        forward = type(module).forward
        if not isinstance(forward, FunctionType) or CALLED not in forward.__code__.co_names:
            found.kept.append(Kept(path, before, f"its forward does not call {CALLED}"))
            continue

        def apply(module: nn.Module = module, forward: FunctionType = forward) -> None:
            replace_forward(module, _with_rope(forward), after="RopeAttention")

        found.changes.append(Change(path, before, "RopeAttention", apply))
    return found
