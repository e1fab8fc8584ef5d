"""Gated linear units in plain PyTorch.

Shape legend: N rows, F features; gate, up, dh and every result are [N, F].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Return act(gate) * up."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (_act(gate.to(wide), activation) * up.to(wide)).to(gate.dtype).contiguous()


def glu_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str, again: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dgate, dup, and h once more, or empty where it is not wanted."""
    dtype = gate.dtype
    wide = torch.promote_types(dtype, torch.float32)
    dh, gate, up = (x.to(wide).contiguous() for x in (dh, gate, up))
    act = _act(gate, activation)
    dgate = _act_backward(dh * up, gate, activation)
    h = act * up if again else act.new_empty(0)
    return dgate.to(dtype), (dh * act).to(dtype), h.to(dtype)


def plain_glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """As Hugging Face's MLPs write it: the activation is rounded, then the product."""
    return _act(gate, activation) * up


def plain_glu_backward(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str, again: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What autograd runs for ``plain_glu``, with the activation kept from the forward."""
    act = _act(gate, activation)
    dgate = _act_backward(dh * up, gate, activation)
    return dgate, dh * act, act * up if again else act.new_empty(0)


def _act(x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return F.silu(x)
    return F.gelu(x, approximate=_APPROXIMATE[activation])


def _act_backward(dy: torch.Tensor, x: torch.Tensor, activation: str) -> torch.Tensor:
    dx: torch.Tensor
    if activation == "silu":
        dx = torch.ops.aten.silu_backward(dy, x)
    else:
        dx = torch.ops.aten.gelu_backward(dy, x, approximate=_APPROXIMATE[activation])
    return dx
