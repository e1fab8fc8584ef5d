"""Norms that a group of linears, their only reader, computes itself.

The group then keeps the norm's input, which the residual stream holds anyway, and not its result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dtune.patch.base import replace_forward
from dtune.patch.families import block_facts, norm_facts
from dtune.patch.fused import FoldedNorm

FOLDED = "FoldedRMSNorm"


def find_norms(model: nn.Module, reader: str) -> dict[int, FoldedNorm]:
    """Id of each reader (``self_attn`` or ``mlp`` of a known block) -> the norm before it."""
    norms: dict[int, FoldedNorm] = {}
    for block in model.modules():
        facts = block_facts(block)
        if facts is None:
            continue
        norm = block.get_submodule(facts.norms[reader])
        own = norm_facts(norm)
        if own is not None:
            norms[id(block.get_submodule(reader))] = FoldedNorm(norm, own)
    return norms


def _pass_on(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x


def fold(norm: FoldedNorm | None) -> None:
    """Make the norm hand its input on, for its reader to norm."""
    if norm is not None:
        replace_forward(norm.module, _pass_on, after=FOLDED)
