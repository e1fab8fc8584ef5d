"""q, k and v projections as one group, with the norm before them folded in."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from dtune.patch.base import Change, Found, Kept, Stage, forward_of, kind_of, patch, replace_forward
from dtune.patch.families import family_of
from dtune.patch.folding import find_norms, fold
from dtune.patch.fused import FoldedNorm, FusedLinears, add_fused
from dtune.patch.linears import is_adapted, why_not
from dtune.types import ModelSpec

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class _Projected:
    """The attention module, with its projections done: each returns what was computed."""

    def __init__(self, module: nn.Module, results: dict[str, torch.Tensor]) -> None:
        self.__module, self.__results = module, results

    def __getattr__(self, name: str) -> Any:
        if name in self.__results:
            result = self.__results[name]
            return lambda x: result
        return getattr(self.__module, name)


@cache
def _after_projections(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The attention's own forward, given the projections of a group."""

    def projected(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        results = dict(zip(PROJECTIONS, self.dtune_fused(hidden_states), strict=True))
        return forward(_Projected(self, results), hidden_states, *args, **kwargs)

    return projected


@patch(Stage.groups)
def plan(model: nn.Module, spec: ModelSpec, enabled: frozenset[str]) -> Found:
    """Attention modules of known families whose base is frozen and that hold an adapter."""
    found = Found()
    norms = find_norms(model, "self_attn") if "rms_norm" in enabled else {}
    for path, module in model.named_modules():
        if not family_of(module, "Attention"):
            continue
        before = kind_of(module)
        if not all(name in module._modules for name in PROJECTIONS):
            found.kept.append(Kept(path, before, "its q, k and v are one linear already"))
            continue
        linears = [module.get_submodule(name) for name in PROJECTIONS]
        reason = next(filter(None, map(why_not, linears)), "")
        if not reason and not any(map(is_adapted, linears)):
            reason = "q, k and v have no adapter"
        if reason:
            found.kept.append(Kept(path, before, reason))
            continue
        forward = _after_projections(forward_of(module))
        norm = norms.get(id(module))
        after = "GroupedAttention" if norm is None else "GroupedAttention with its norm"
        apply = _Apply(module, linears, norm, forward)
        found.changes.append(Change(path, before, after, apply))
    return found


class _Apply:
    def __init__(
        self,
        module: nn.Module,
        linears: list[nn.Module],
        norm: FoldedNorm | None,
        forward: Callable[..., Any],
    ) -> None:
        self.module, self.linears, self.norm, self.forward = module, linears, norm, forward

    def __call__(self) -> None:
        add_fused(self.module, FusedLinears(self.linears, self.norm))
        fold(self.norm)
        replace_forward(self.module, self.forward, after="GroupedAttention")
