"""The LoRA ops: schemas, fakes, arguments. See ``reference`` for what they compute.

The base matrix products are no part of them: cuBLAS keeps those.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dtune_kernels.library import Shape, define
from dtune_kernels.lora import costs, plain, reference

SOURCE = "Hu et al. 2021, arXiv:2106.09685, eq. 3; peft.tuners.lora.Linear"
GLU_SOURCE = "Shazeer 2020, arXiv:2002.05202, eq. 6; Hugging Face LlamaMLP with peft"
SCALE = 2.0


def _project_fake(
    x: torch.Tensor, a: Sequence[torch.Tensor], seed: torch.Tensor | None, dropout: Sequence[float]
) -> torch.Tensor:
    size = (x.shape[0], sum(each.shape[0] for each in a))
    return x.new_empty(size, dtype=torch.promote_types(x.dtype, torch.float32))


def _expand_in_place_fake(*_: Any) -> None:
    return None


def _expand_fake(y: Sequence[torch.Tensor], *_: Any) -> list[torch.Tensor]:
    return [each.new_empty(each.shape) for each in y]


def _grad_b_fake(
    dy: Sequence[torch.Tensor],
    p: torch.Tensor,
    b: Sequence[torch.Tensor],
    member: Sequence[int],
    scale: Sequence[float],
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return p.new_empty(p.shape), [each.new_empty(each.shape) for each in b]


def _grad_a_fake(
    x: torch.Tensor, ds: torch.Tensor, a: Sequence[torch.Tensor], *_: Any
) -> list[torch.Tensor]:
    return [each.new_empty(each.shape) for each in a]


def _glu_fake(gate: torch.Tensor, *_: Any) -> torch.Tensor:
    return gate.new_empty(gate.shape)


def _glu_backward_fake(
    dh: torch.Tensor, gate: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape), gate.new_empty(gate.shape)


class _Draw:
    """Random arguments for a layer's sizes; adapters in fp32 beside a lower type."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self.adapter = torch.promote_types(dtype, torch.float32)
        self.kv = shape.kv_heads * shape.head_dim

    def rows(self, features: int) -> torch.Tensor:
        """[T, features]."""
        return torch.randn(self.shape.tokens, features, dtype=self.dtype, device=self.device)

    def low_rank(self, count: int) -> torch.Tensor:
        """[T, count R], as P and dS are."""
        size = (self.shape.tokens, count * self.shape.rank)
        return torch.randn(size, dtype=self.adapter, device=self.device)

    def a(self, features: int) -> torch.Tensor:
        """[R, features]."""
        size = (self.shape.rank, features)
        return torch.randn(size, dtype=self.adapter, device=self.device)

    def b(self, features: int) -> torch.Tensor:
        """[features, R]."""
        size = (features, self.shape.rank)
        return torch.randn(size, dtype=self.adapter, device=self.device)


def _project_arguments(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    draw = _Draw(shape, dtype, device)
    a = [draw.a(shape.hidden) for _ in range(3)]
    return draw.rows(shape.hidden), a, None, [0.0] * 3


def _expand_in_place_arguments(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[Any, ...]:
    draw = _Draw(shape, dtype, device)
    sizes = (shape.hidden, draw.kv, draw.kv)
    y, b = [draw.rows(size) for size in sizes], [draw.b(size) for size in sizes]
    return y, draw.low_rank(3), b, [0, 1, 2], [SCALE] * 3, None, [0.0] * 3


def _expand_arguments(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    return _expand_in_place_arguments(shape, dtype, device)[:5]


def _grad_b_arguments(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    return _expand_arguments(shape, dtype, device)


def _grad_a_arguments(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    draw = _Draw(shape, dtype, device)
    a = [draw.a(shape.hidden) for _ in range(3)]
    h, ds = draw.rows(shape.hidden), draw.low_rank(3)
    rstd = torch.rsqrt(h.to(draw.adapter).square().mean(-1))
    weight = torch.rand(shape.hidden, dtype=dtype, device=device)
    return h, ds, a, None, [0.0] * 3, rstd, weight, False


def _glu_arguments(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    draw = _Draw(shape, dtype, device)
    gate, up = draw.rows(shape.ffn), draw.rows(shape.ffn)
    b = [draw.b(shape.ffn) for _ in range(2)]
    return gate, up, draw.low_rank(2), b, [0, 1], [SCALE] * 2, "silu"


def _glu_backward_arguments(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[Any, ...]:
    draw = _Draw(shape, dtype, device)
    *forward, activation = _glu_arguments(shape, dtype, device)
    after = (draw.low_rank(1), [draw.a(shape.ffn)], None, [0.0])
    return draw.rows(shape.ffn), *forward, *after, activation


project = define(
    "lora_project(Tensor x, Tensor[] a, Tensor? seed, float[] dropout) -> Tensor",
    reference=reference.project,
    plain=plain.project,
    triton="dtune_kernels.lora.triton_project:project",
    fake=_project_fake,
    cost=costs.project,
    arguments=_project_arguments,
    source=SOURCE,
)
expand = define(
    "lora_expand(Tensor[] y, Tensor p, Tensor[] b, int[] member, float[] scale) -> Tensor[]",
    reference=reference.expand,
    plain=plain.expand,
    triton="dtune_kernels.lora.triton_expand:expand",
    fake=_expand_fake,
    cost=costs.expand,
    arguments=_expand_arguments,
    source=SOURCE,
)
expand_ = define(
    "lora_expand_(Tensor(a!)[] y, Tensor p, Tensor[] b, int[] member, float[] scale, Tensor? seed,"
    " float[] dropout) -> ()",
    reference=reference.expand_,
    plain=plain.expand_,
    triton="dtune_kernels.lora.triton_expand:expand_",
    fake=_expand_in_place_fake,
    cost=costs.expand_,
    arguments=_expand_in_place_arguments,
    source=SOURCE,
)
grad_b = define(
    "lora_grad_b(Tensor[] dy, Tensor p, Tensor[] b, int[] member, float[] scale)"
    " -> (Tensor, Tensor[])",
    reference=reference.grad_b,
    plain=plain.grad_b,
    triton="dtune_kernels.lora.triton_grad_b:grad_b",
    fake=_grad_b_fake,
    cost=costs.grad_b,
    arguments=_grad_b_arguments,
    source=SOURCE,
)
grad_a = define(
    "lora_grad_a(Tensor x, Tensor ds, Tensor[] a, Tensor? seed, float[] dropout, Tensor? rstd,"
    " Tensor? norm_weight, bool gemma) -> Tensor[]",
    reference=reference.grad_a,
    plain=plain.grad_a,
    triton="dtune_kernels.lora.triton_grad:grad_a",
    fake=_grad_a_fake,
    cost=costs.grad_a,
    arguments=_grad_a_arguments,
    source=SOURCE,
)
glu = define(
    "lora_glu(Tensor gate, Tensor up, Tensor? p, Tensor[] b, int[] member, float[] scale,"
    " str activation) -> Tensor",
    reference=reference.glu,
    plain=plain.glu,
    triton="dtune_kernels.lora.triton_glu:glu",
    fake=_glu_fake,
    cost=costs.glu,
    arguments=_glu_arguments,
    source=GLU_SOURCE,
)
glu_backward = define(
    "lora_glu_backward(Tensor dh, Tensor gate, Tensor up, Tensor? p, Tensor[] b, int[] member,"
    " float[] scale, Tensor? ds, Tensor[] a, Tensor? seed, float[] dropout, str activation)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.glu_backward,
    plain=plain.glu_backward,
    triton="dtune_kernels.lora.triton_glu:glu_backward",
    fake=_glu_backward_fake,
    cost=costs.glu_backward,
    arguments=_glu_backward_arguments,
    source=GLU_SOURCE,
)
