"""The rotary ops: schemas, fakes, costs."""

from __future__ import annotations

import torch

from dtune_kernels.library import Cost, Shape, define, nbytes
from dtune_kernels.rope import reference
from dtune_kernels.rope.tables import rotary_tables

SOURCE = (
    "Su et al. 2021, arXiv:2104.09864, eq. 34, with feature i paired with feature i + R / 2;"
    " Hugging Face apply_rotary_pos_emb of Llama and Phi-3"
)


def _fake(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transpose: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


def _in_place_fake(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transpose: bool
) -> None:
    return None


def _cost(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transpose: bool
) -> Cost:
    return Cost(
        flops=3 * _rotated(q, k, cos),
        read=nbytes(q, k, cos, sin),
        written=nbytes(q, k),
        # The tables are the model's, one pair for all layers.
        saved=0,
    )


def _in_place_cost(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, transpose: bool
) -> Cost:
    elements = _rotated(q, k, cos)
    moved = elements * q.element_size()
    return Cost(flops=3 * elements, read=moved + nbytes(cos, sin), written=moved)


def _rotated(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor) -> int:
    """Elements that are rotated."""
    return (q.numel() + k.numel()) // q.shape[-1] * cos.shape[-1]


def _arguments(
    shape: Shape, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """Queries and keys as views of what their linears return."""
    size = (1, shape.tokens, -1, shape.head_dim)
    q, k = (
        torch.randn(1, shape.tokens, heads * shape.head_dim, dtype=dtype, device=device)
        .view(size)
        .transpose(1, 2)
        for heads in (shape.heads, shape.kv_heads)
    )
    positions = torch.arange(shape.tokens, device=device)[None]
    exponents = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
    cos, sin = rotary_tables(positions, 500000.0**-exponents, 1.0, dtype)
    return q, k, cos, sin, False


rotate = define(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool transpose) -> (Tensor, Tensor)",
    reference=reference.rope,
    plain=reference.plain_rope,
    triton="dtune_kernels.rope.triton:rope",
    fake=_fake,
    cost=_cost,
    arguments=_arguments,
    source=SOURCE,
)
rotate_ = define(
    "rope_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, bool transpose) -> ()",
    reference=reference.rope_,
    plain=reference.plain_rope_,
    triton="dtune_kernels.rope.triton:rope_",
    fake=_in_place_fake,
    cost=_in_place_cost,
    arguments=_arguments,
    source=SOURCE,
)
