"""Activations of gated units and their derivatives, in plain PyTorch.

The names are PyTorch's: ``silu``, ``gelu`` (with erf) and ``gelu_tanh``; Hendrycks and Gimpel 2016,
arXiv:1606.08415; Shazeer 2020, arXiv:2002.05202.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_CUBE = 0.044715


def activated(x: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return act(x) and its derivative at x."""
    if activation == "silu":
        gate = torch.sigmoid(x)
        return x * gate, gate * (1 + x * torch.sigmoid(-x))
    if activation == "gelu":
        gate = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        return x * gate, gate + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    # 1 + tanh(z) = 2 sigmoid(2 z)
    twice = 2 * math.sqrt(2 / math.pi)
    z = twice * (x + _CUBE * x**3)
    gate = torch.sigmoid(z)
    # sigmoid(-z), not 1 - sigmoid(z), which is off by as much as sigmoid(z) is rounded.
    return x * gate, gate + x * gate * torch.sigmoid(-z) * twice * (1 + 3 * _CUBE * x * x)


def plain(x: torch.Tensor, activation: str) -> torch.Tensor:
    """act(x) as PyTorch computes it."""
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
