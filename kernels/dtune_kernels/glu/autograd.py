"""Gated linear units with their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function

from dtune_kernels.checks import FLOATS, check, check_device, check_dtype, check_shape
from dtune_kernels.glu import ops
from dtune_kernels.glu.reference import ACTIVATIONS
from dtune_kernels.layout import dense_rows
from dtune_kernels.library import apply


class _Glu(Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        gate_rows, up_rows = dense_rows(gate), dense_rows(up)
        ctx.save_for_backward(gate_rows, up_rows)
        ctx.activation, ctx.shape = activation, gate.shape
        h: torch.Tensor = ops.forward(gate_rows, up_rows, activation).view(gate.shape)
        return h

    @staticmethod
    def backward(ctx: Any, dh: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate, dup, _ = ops.backward(dense_rows(dh), gate, up, ctx.activation, False)
        return dgate.view(ctx.shape), dup.view(ctx.shape), None


def glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Return act(gate) * up, both factors in fp32, their product rounded once.

    Args:
        gate: [..., F], any strides; the halves of one [..., 2 F] tensor are read where they lie.
        up: Shape, dtype and device of gate.
        activation: ``silu``; ``gelu``, by the error function; ``gelu_tanh``, its approximation.

    Raises:
        KernelArgumentError: A shape, dtype or device does not fit, or the activation is unknown.

    Shazeer 2020, arXiv:2002.05202, eq. 6; Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    check(activation in ACTIVATIONS, "glu", "activation", got=activation, wanted=ACTIVATIONS)
    check_dtype("glu", "gate", gate, FLOATS)
    check_dtype("glu", "up", up, (gate.dtype,))
    has_features = gate.dim() > 0 and gate.shape[-1] > 0
    check(has_features, "glu", "shape of gate", got=list(gate.shape), wanted="[..., F], F > 0")
    check_shape("glu", "up", up, gate.shape)
    check_device("glu", gate=gate, up=up)
    h: torch.Tensor = apply(_Glu, gate, up, activation)
    return h


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up; see ``glu``."""
    return glu(gate, up, "silu")


def geglu(gate: torch.Tensor, up: torch.Tensor, *, tanh: bool) -> torch.Tensor:
    """Return gelu(gate) * up, by the tanh approximation or by the error function; see ``glu``."""
    return glu(gate, up, "gelu_tanh" if tanh else "gelu")
