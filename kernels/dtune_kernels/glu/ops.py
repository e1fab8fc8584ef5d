"""The ops of gated linear units: schemas, fakes, costs."""

from __future__ import annotations

import torch

from dtune_kernels.glu import reference
from dtune_kernels.library import Cost, Shape, define, nbytes

SOURCE = (
    "Shazeer 2020, arXiv:2002.05202, eq. 6, without bias; torch.nn.functional.silu and gelu,"
    " Hugging Face LlamaMLP, GemmaMLP"
)


def _forward_fake(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return gate.new_empty(gate.shape)


def _backward_fake(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str, again: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h = gate.new_empty(gate.shape if again else (0,))
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape), h


def _forward_cost(gate: torch.Tensor, up: torch.Tensor, activation: str) -> Cost:
    return Cost(
        flops=6 * gate.numel(),
        read=nbytes(gate, up),
        written=nbytes(gate),
        saved=nbytes(gate, up),
    )


def _backward_cost(
    dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, activation: str, again: bool
) -> Cost:
    return Cost(
        flops=(13 if again else 12) * gate.numel(),
        read=nbytes(dh, gate, up),
        written=(3 if again else 2) * nbytes(gate),
    )


def _rows(shape: Shape, dtype: torch.dtype, device: torch.device, count: int) -> list[torch.Tensor]:
    size = (shape.tokens, shape.ffn)
    return [torch.randn(size, dtype=dtype, device=device) for _ in range(count)]


def _forward_arguments(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, str]:
    gate, up = _rows(shape, dtype, device, 2)
    return gate, up, "silu"


def _backward_arguments(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, str, bool]:
    dh, gate, up = _rows(shape, dtype, device, 3)
    return dh, gate, up, "silu", True


forward = define(
    "glu(Tensor gate, Tensor up, str activation) -> Tensor",
    reference=reference.glu,
    plain=reference.plain_glu,
    triton="dtune_kernels.glu.triton:glu",
    fake=_forward_fake,
    cost=_forward_cost,
    arguments=_forward_arguments,
    source=SOURCE,
)
backward = define(
    "glu_backward(Tensor dh, Tensor gate, Tensor up, str activation, bool again)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.glu_backward,
    plain=reference.plain_glu_backward,
    triton="dtune_kernels.glu.triton:glu_backward",
    fake=_backward_fake,
    cost=_backward_cost,
    arguments=_backward_arguments,
    source=SOURCE,
)
