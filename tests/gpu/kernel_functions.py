"""Differentiable functions of the kernels on sizes of real layers, and the same by plain PyTorch.

Size legend: T tokens, D hidden, F of the MLP, V vocabulary, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from dtune_kernels.check import tensors_in
from dtune_kernels.cross_entropy import linear_cross_entropy
from dtune_kernels.dora import dora_linear
from dtune_kernels.glu import glu
from dtune_kernels.glu.reference import plain_glu
from dtune_kernels.library import Shape
from dtune_kernels.lora import Adapter, Linear, Norm, lora_linears, lora_mlp
from dtune_kernels.rms_norm import add_rms_norm, rms_norm
from dtune_kernels.rms_norm.reference import plain_rms_norm
from dtune_kernels.rope import rope
from dtune_kernels.rope.reference import plain_rope

EPS = 1e-6
SCALE = 2.0


@dataclass(frozen=True)
class Function:
    """A function, the same in plain PyTorch, and what they are called with."""

    ours: Callable[..., Any]
    plain: Callable[..., Any]
    leaves: tuple[torch.Tensor, ...]
    """They get gradients."""
    frozen: tuple[torch.Tensor, ...] = ()
    """They come after the leaves and get none."""


@dataclass
class Draw:
    """Random operands; adapters in fp32 beside a lower type, as they are trained."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def rows(self, features: int) -> torch.Tensor:
        """[T, features]."""
        return torch.randn(self.shape.tokens, features, dtype=self.dtype, device=self.device)

    def weight(self, outputs: int, inputs: int) -> torch.Tensor:
        """[outputs, inputs], frozen."""
        x = torch.randn(outputs, inputs, dtype=self.dtype, device=self.device)
        return x * inputs**-0.5

    def norm_weight(self) -> torch.Tensor:
        """[D]."""
        x = torch.randn(self.shape.hidden, dtype=self.dtype, device=self.device)
        return 1 + x / 4

    def adapter(self, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A [R, inputs] and B [outputs, R]."""
        rank = self.shape.rank
        a = torch.randn(rank, inputs, device=self.device) * inputs**-0.5
        return a, torch.randn(outputs, rank, device=self.device) * rank**-0.5


def _linear(
    x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    """As PEFT computes it under autocast: adapters are cast, results added in the dtype of x."""
    low_rank = F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
    return F.linear(x, weight) + low_rank * SCALE


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return plain_rms_norm(x, weight, EPS, False)[0]


def of_rms_norm(draw: Draw) -> Function:
    """Norm with a trained weight."""
    return Function(
        lambda x, weight: rms_norm(x, weight, eps=EPS),
        _norm,
        (draw.rows(draw.shape.hidden), draw.norm_weight()),
    )


def of_add_rms_norm(draw: Draw) -> Function:
    """Sum and norm; Gemma's kind."""

    def plain(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        h = x + residual
        return plain_rms_norm(h, weight, EPS, True)[0], h

    rows = draw.rows(draw.shape.hidden), draw.rows(draw.shape.hidden)
    return Function(
        lambda x, residual, weight: add_rms_norm(x, residual, weight, eps=EPS, gemma=True),
        plain,
        (*rows, draw.norm_weight() - 1),
    )


def of_rope(draw: Draw) -> Function:
    """Queries and keys as views of rows; tables in fp32."""
    shape = draw.shape
    q, k = (
        draw.rows(heads * shape.head_dim).view(1, shape.tokens, heads, -1).transpose(1, 2)
        for heads in (shape.heads, shape.kv_heads)
    )
    angles = 10 * torch.rand(1, shape.tokens, shape.head_dim // 2, device=draw.device)
    angles = torch.cat((angles, angles), -1)

    def plain(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        return plain_rope(q, k, cos.to(q.dtype), sin.to(q.dtype), False)

    return Function(rope, plain, (q, k), (angles.cos(), angles.sin()))


def _of_glu(draw: Draw, activation: str) -> Function:
    return Function(
        lambda gate, up: glu(gate, up, activation),
        lambda gate, up: plain_glu(gate, up, activation),
        (draw.rows(draw.shape.ffn), draw.rows(draw.shape.ffn)),
    )


def of_swiglu(draw: Draw) -> Function:
    """silu(gate) * up."""
    return _of_glu(draw, "silu")


def of_geglu(draw: Draw) -> Function:
    """gelu(gate) * up by the tanh approximation."""
    return _of_glu(draw, "gelu_tanh")


def of_lora_linears(draw: Draw) -> Function:
    """Queries, keys and values behind a norm."""
    shape = draw.shape
    kv = shape.kv_heads * shape.head_dim
    sizes = (shape.heads * shape.head_dim, kv, kv)
    weights = tuple(draw.weight(size, shape.hidden) for size in sizes)
    adapters = [x for size in sizes for x in draw.adapter(size, shape.hidden)]

    def pairs(tensors: tuple[torch.Tensor, ...]) -> Any:
        return zip(tensors[-3:], tensors[0:6:2], tensors[1:6:2], strict=True)

    def ours(x: torch.Tensor, norm: torch.Tensor, *tensors: torch.Tensor) -> Any:
        group = [Linear(w, None, (Adapter(a, b, SCALE),)) for w, a, b in pairs(tensors)]
        return lora_linears(x, group, norm=Norm(norm, EPS, False))

    def plain(x: torch.Tensor, norm: torch.Tensor, *tensors: torch.Tensor) -> Any:
        normed = _norm(x, norm)
        return tuple(_linear(normed, w, a, b) for w, a, b in pairs(tensors))

    leaves = (draw.rows(shape.hidden), draw.norm_weight(), *adapters)
    return Function(ours, plain, leaves, weights)


def of_lora_mlp(draw: Draw) -> Function:
    """down(silu(gate(x)) * up(x)) behind a norm."""
    shape = draw.shape
    sizes = ((shape.ffn, shape.hidden), (shape.ffn, shape.hidden), (shape.hidden, shape.ffn))
    weights = tuple(draw.weight(*size) for size in sizes)
    adapters = [x for size in sizes for x in draw.adapter(*size)]

    def ours(x: torch.Tensor, norm: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        triples = zip(tensors[-3:], tensors[0:6:2], tensors[1:6:2], strict=True)
        linears = [Linear(w, None, (Adapter(a, b, SCALE),)) for w, a, b in triples]
        return lora_mlp(x, *linears, activation="silu", norm=Norm(norm, EPS, False))

    def plain(x: torch.Tensor, norm: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        a1, b1, a2, b2, a3, b3, gate, up, down = tensors
        normed = _norm(x, norm)
        inner = F.silu(_linear(normed, gate, a1, b1)) * _linear(normed, up, a2, b2)
        return _linear(inner, down, a3, b3)

    leaves = (draw.rows(shape.hidden), draw.norm_weight(), *adapters)
    return Function(ours, plain, leaves, weights)


def of_dora_linear(draw: Draw) -> Function:
    """A projection [D, D]."""
    hidden = draw.shape.hidden
    weight = draw.weight(hidden, hidden)
    a, b = draw.adapter(hidden, hidden)
    magnitude = (weight.float() + SCALE * b @ a).norm(dim=1)
    magnitude = magnitude * (1 + 0.1 * torch.rand_like(magnitude))

    def ours(x, a, b, magnitude, weight):  # type: ignore[no-untyped-def]
        return dora_linear(x, Linear(weight, None, (Adapter(a, b, SCALE),)), magnitude)

    def plain(x, a, b, magnitude, weight):  # type: ignore[no-untyped-def]
        product = (b.to(weight.dtype) @ a.to(weight.dtype)).detach()
        norm = torch.linalg.norm(weight + SCALE * product, dim=1)
        gain = (magnitude / norm).to(x.dtype)
        y = F.linear(x, weight)
        low_rank = F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
        return y + ((gain - 1) * y + gain * low_rank * SCALE)

    return Function(ours, plain, (draw.rows(hidden), a, b, magnitude), (weight,))


def _labels(draw: Draw) -> torch.Tensor:
    """A third of the tokens have none."""
    labels = torch.randint(draw.shape.vocab, (draw.shape.tokens,), device=draw.device)
    labels[::3] = -100
    return labels


def of_linear_cross_entropy(draw: Draw) -> Function:
    """Of a frozen head."""
    labels = _labels(draw)
    targets = int((labels >= 0).sum())

    def ours(hidden, weight, labels):  # type: ignore[no-untyped-def]
        return linear_cross_entropy(hidden, weight, labels, num_targets=targets)

    def plain(hidden, weight, labels):  # type: ignore[no-untyped-def]
        logits = F.linear(hidden, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels, reduction="sum")

    shape = draw.shape
    head = draw.weight(shape.vocab, shape.hidden)
    return Function(ours, plain, (draw.rows(shape.hidden),), (head, labels))


FUNCTIONS = {
    "rms_norm": of_rms_norm,
    "add_rms_norm": of_add_rms_norm,
    "rope": of_rope,
    "swiglu": of_swiglu,
    "geglu": of_geglu,
    "lora_linears": of_lora_linears,
    "lora_mlp": of_lora_mlp,
    "dora_linear": of_dora_linear,
    "linear_cross_entropy": of_linear_cross_entropy,
}


def with_gradients(
    function: Function, run: Callable[..., Any], *, double: bool = False
) -> list[torch.Tensor]:
    """Outputs of ``run``, then the gradients of the leaves, for the same random upstream."""

    def cast(x: torch.Tensor) -> torch.Tensor:
        x = x.detach()
        return x.double() if double and x.is_floating_point() else x

    leaves = [cast(x).requires_grad_() for x in function.leaves]
    outputs = list(tensors_in(run(*leaves, *(cast(x) for x in function.frozen))))
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    upstream = [
        torch.randn(y.shape, generator=generator, device=y.device).to(function.leaves[0].dtype)
        for y in outputs
    ]
    grads = torch.autograd.grad(
        outputs, leaves, [g.to(y.dtype) for g, y in zip(upstream, outputs, strict=True)]
    )
    return [x.detach() for x in (*outputs, *grads)]
