"""Modules that compute with parameters which other modules own.

A fused forward is a module of its own, without parameters, below the module that it serves, and
called with positional tensors: ZeRO-3 then finds what it reads, gathers it around the forward, and
releases it after the backward of those tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dtune_kernels.cross_entropy import linear_cross_entropy
from dtune_kernels.lora import Linear, Norm, lora_linears, lora_mlp
from torch import nn

from dtune.patch.families import HeadFacts, NormFacts
from dtune.patch.linears import linear_of

CHILD = "dtune_fused"
"""Name of the fused module below the module that it serves."""


class FoldedNorm:
    """An RMSNorm that its only reader computes."""

    def __init__(self, module: nn.Module, facts: NormFacts) -> None:
        self.module, self.facts = module, facts

    def arguments(self) -> Norm:
        """As the kernels take it."""
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return Norm(weight, self.facts.eps, self.facts.gemma)


class Fused(nn.Module):
    """A group of linears, and the norm before them where it is folded in."""

    def __init__(self, linears: Sequence[nn.Module], norm: FoldedNorm | None) -> None:
        super().__init__()
        # In a tuple: the linears stay children of their own parents alone.
        self.linears = tuple(linears)
        self._norm = norm

    def _arguments(self) -> tuple[list[Linear], Norm | None]:
        norm = None if self._norm is None else self._norm.arguments()
        return [linear_of(linear) for linear in self.linears], norm


class FusedLinears(Fused):
    """Linears that read one input."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """[..., K] -> [..., O_1], [..., O_2], ..."""
        linears, norm = self._arguments()
        return lora_linears(x, linears, norm=norm)


class FusedMlp(Fused):
    """down(act(gate(x)) * up(x))."""

    def __init__(
        self, linears: Sequence[nn.Module], norm: FoldedNorm | None, activation: str
    ) -> None:
        super().__init__(linears, norm)
        self._activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D]."""
        (gate, up, down), norm = self._arguments()
        return lora_mlp(x, gate, up, down, activation=self._activation, norm=norm)


class FusedHead(nn.Module):
    """The losses of a language-model head, without its logits."""

    def __init__(self, head: nn.Linear, facts: HeadFacts) -> None:
        super().__init__()
        self._head = (head,)
        self._facts = facts

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, num_targets: int) -> torch.Tensor:
        """Sum of the cross entropies of labels [B, S] that hidden [B, S, D] predicts; fp32."""
        head = self._head[0]
        return linear_cross_entropy(
            hidden.flatten(0, 1),
            head.weight,
            labels.flatten(),
            num_targets=num_targets,
            bias=head.bias,
            softcap=self._facts.softcap,
            logit_scale=self._facts.scale,
        )


def add_fused(module: nn.Module, fused: nn.Module) -> None:
    """Put a fused module below the module that it serves."""
    module.add_module(CHILD, fused)


def remove_fused(model: nn.Module) -> None:
    """Take all fused modules away."""
    for module in list(model.modules()):
        if CHILD in module._modules:
            del module._modules[CHILD]
