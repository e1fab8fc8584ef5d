"""Recomputation that keeps what is dear: attention over packed documents is not computed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from dtune.parallel.selective import Contexts, is_dear, keep_on_device, keep_packed

TOKENS, HEADS, DIM = 12, 2, 8
BOUNDS = torch.tensor([0, 5, 12], dtype=torch.int32)


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Causal probabilities [H, T, T] within documents of queries and keys [H, T, D]."""
    document = torch.bucketize(torch.arange(TOKENS), BOUNDS, right=True)
    hidden = (document[:, None] != document).logical_or(torch.ones(TOKENS, TOKENS).triu(1) > 0)
    return (q @ k.mT / DIM**0.5).masked_fill(hidden, -torch.inf).softmax(-1)


class Kernel:
    """Stands where torch has its kernel for GPUs, and counts."""

    def __init__(self) -> None:
        self.forwards = self.backwards = 0

    def forward(self, q: Any, k: Any, v: Any, *rest: Any) -> tuple[torch.Tensor, ...]:
        """What the op returns: results [T, H, D], sums of scores, the state of a generator."""
        self.forwards += 1
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out = (scores(q, k) @ v).transpose(0, 1).contiguous()
        return out, torch.zeros(HEADS, TOKENS), torch.zeros(2, dtype=torch.uint64)

    def backward(self, grad: Any, q: Any, k: Any, v: Any, out: Any, *rest: Any) -> tuple[Any, ...]:
        """Gradients of queries, keys and values; of the results those that were kept are taken."""
        self.backwards += 1
        grad, q, k, v, out = (x.transpose(0, 1) for x in (grad, q, k, v, out))
        found = scores(q, k)
        of_scores = found * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) / DIM**0.5
        parts = (of_scores @ k, of_scores.mT @ q, found.mT @ grad)
        return tuple(part.transpose(0, 1).contiguous() for part in parts)


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    """On a CPU the op has no kernel of its own."""
    own = Kernel()
    with torch.library._scoped_library("torch_attn", "IMPL") as library:
        library.impl("_varlen_attn", own.forward, "CPU")
        library.impl("_varlen_attn_backward", own.backward, "CPU")
        yield own


def block(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[T, H * D] -> the same: a product, attention within documents, and what is cheap."""
    q, k, v = (x @ weight).view(TOKENS, HEADS, 3 * DIM).split(DIM, dim=-1)
    out = varlen_attn(q, k, v, BOUNDS, BOUNDS, TOKENS, TOKENS, window_size=(-1, 0))
    assert isinstance(out, torch.Tensor)
    return torch.nn.functional.silu(out.reshape(TOKENS, -1))


def gradients(run: Callable[..., Any]) -> list[torch.Tensor]:
    """Of the input and the weight of a block that is run."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, HEADS * DIM), (HEADS * DIM, HEADS * 3 * DIM))
    leaves = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    run(block, *leaves).square().sum().backward()
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def plainly(forward: Callable[..., Any], *args: Any) -> Any:
    return forward(*args)


KEEPING: dict[str, Contexts] = {
    "on the device": keep_on_device,
    "packed": partial(keep_packed, lambda tensor: tensor, lambda kept: kept),
}


@pytest.mark.parametrize("where", KEEPING)
def test_attention_over_documents_is_kept_and_not_computed_again(
    kernel: Kernel, where: str
) -> None:
    expected = gradients(plainly)
    kernel.forwards = kernel.backwards = 0
    found = gradients(partial(checkpoint, use_reentrant=False, context_fn=KEEPING[where]))
    assert (kernel.forwards, kernel.backwards) == (1, 1)
    assert len(found) == 2
    assert all(map(torch.equal, found, expected))


def test_without_keeping_it_is_computed_twice(kernel: Kernel) -> None:
    """What the count would show if the op were not known."""
    gradients(partial(checkpoint, use_reentrant=False))
    assert (kernel.forwards, kernel.backwards) == (2, 1)


def test_the_op_of_flash_attn_is_known_by_its_name() -> None:
    """The package needs a GPU; its ops begin so."""
    with torch.library._scoped_library("flash_attn", "FRAGMENT") as library:
        for name in ("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"):
            library.define(f"{name}(Tensor q) -> Tensor")
        forward, backward = (
            getattr(torch.ops.flash_attn, f"_flash_attn_varlen_{way}").default
            for way in ("forward", "backward")
        )
        assert is_dear(forward, (torch.empty(1),))
        assert not is_dear(backward, (torch.empty(1),))


def test_what_is_no_op_is_not_dear() -> None:
    """Modes see calls of higher order as well, which have no schema."""
    assert not is_dear(torch.ops.higher_order.cond, ())
