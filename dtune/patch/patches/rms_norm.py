"""RMSNorms by one kernel each way, without the gradient of a frozen weight."""

from __future__ import annotations

from typing import Any

import torch
from dtune_kernels.rms_norm import rms_norm
from torch import nn

from dtune.patch.base import Change, Found, Stage, kind_of, patch, replace_forward
from dtune.patch.families import norm_facts
from dtune.patch.folding import FOLDED
from dtune.types import ModelSpec


def _llama(self: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, self.weight, eps=self.variance_epsilon)


def _gemma(self: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, self.weight, eps=self.eps, gemma=True)


@patch(Stage.modules)
def plan(model: nn.Module, spec: ModelSpec, enabled: frozenset[str]) -> Found:
    """Every RMSNorm that no group of linears has taken."""
    found = Found()
    for path, module in model.named_modules():
        facts = norm_facts(module)
        if facts is None or type(module).__name__ == FOLDED:
            continue
        forward = _gemma if facts.gemma else _llama

        def apply(module: nn.Module = module, forward: Any = forward) -> None:
            replace_forward(module, forward, after="FusedRMSNorm")

        found.changes.append(Change(path, kind_of(module), "FusedRMSNorm", apply))
    return found
