"""The head of a causal model together with its loss: no logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from dtune.patch.base import Change, Found, Kept, Stage, forward_of, kind_of, patch, replace_forward
from dtune.patch.families import head_facts
from dtune.patch.fused import FusedHead, add_fused
from dtune.types import LOSS_LABELS, NUM_TARGETS, AddsTokens, FusesLoss, ModelSpec


@cache
def _with_loss(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The model's own forward, unless the sum of losses is asked for."""

    # wraps: generation asks a model's forward which arguments it takes.
    @wraps(forward)
    def forward_or_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        if LOSS_LABELS not in kwargs:
            return forward(self, *args, **kwargs)
        labels: torch.Tensor = kwargs.pop(LOSS_LABELS)
        num_targets: int = kwargs.pop(NUM_TARGETS)
        hidden = self.model(*args, **kwargs).last_hidden_state
        return CausalLMOutputWithPast(loss=self.dtune_fused(hidden, labels, num_targets))

    return forward_or_loss


@patch(Stage.modules)
def plan(model: nn.Module, spec: ModelSpec, enabled: frozenset[str]) -> Found:
    """The model itself, where it is of a known family and its head is a plain linear."""
    before = kind_of(model)
    facts = head_facts(model)
    if facts is None:
        return Found(kept=[Kept("model", before, "what it does to its logits is not known")])
    head = model.get_submodule("lm_head")
    if type(head) is not nn.Linear:
        reason = f"{type(head).__name__} is no plain linear"
        return Found(kept=[Kept("lm_head", type(head).__name__, reason)])

    def apply() -> None:
        add_fused(model, FusedHead(head, facts))
        own: Any = type(model)
        # What a method adds tokens around, it takes away again from what this returns.
        name = "own_forward" if issubclass(own, AddsTokens) else "forward"
        forward = own.own_forward if name == "own_forward" else forward_of(model)
        after = f"{before}WithLoss"
        replace_forward(model, _with_loss(forward), after=after, trait=FusesLoss, name=name)

    return Found([Change("lm_head", "Linear", "linear_cross_entropy", apply)])
