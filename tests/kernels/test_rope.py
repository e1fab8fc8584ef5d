"""Rotary embedding: exact, by reference and by Triton, forward and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from dtune_kernels.catalog import CATALOG
from dtune_kernels.errors import KernelArgumentError
from dtune_kernels.launch import recorded
from dtune_kernels.rope import rope, rope_, rotary_tables
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rope
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi3_rope

from tests.kernels.compare import assert_parity, triton_on_cpu

Heads = tuple[torch.Tensor, torch.Tensor]
BACKENDS = {"reference": nullcontext, "triton": triton_on_cpu}
# Batch, query heads, key heads, positions, features of a head, of them rotated.
SIZES = [
    (1, 1, 1, 1, 2, 2),
    (2, 4, 2, 5, 8, 8),
    (1, 3, 1, 7, 10, 6),
    (2, 5, 5, 3, 24, 18),
    (1, 34, 2, 2, 64, 64),
    (0, 4, 2, 5, 8, 8),
    (2, 4, 2, 0, 8, 8),
]
SMALL = SIZES[1]


def heads(batch: int, count: int, positions: int, features: int) -> torch.Tensor:
    """A view of what a linear returns, as models have it."""
    flat = torch.randn(batch, positions, count * features)
    return flat.view(batch, positions, count, features).transpose(1, 2)


def inputs(size: tuple[int, ...], *, factor: float = 1.0) -> tuple[torch.Tensor, ...]:
    batch, queries, keys, positions, features, rotated = size
    ids = torch.randint(0, 4000, (batch, positions))
    frequencies = 10000.0 ** -(torch.arange(0, rotated, 2) / rotated)
    cos, sin = rotary_tables(ids, frequencies, factor, torch.float32)
    q, k = (heads(batch, count, positions, features) for count in (queries, keys))
    return q, k, cos, sin


def with_grads(
    function: Callable[..., Heads],
    arguments: tuple[torch.Tensor, ...],
    upstream: Heads,
    dtype: torch.dtype,
    tables: torch.dtype,
) -> list[torch.Tensor]:
    q, k, cos, sin = arguments
    # preserve_format: leaves keep the memory order.
    leaves = [x.to(dtype).detach().clone().requires_grad_() for x in (q, k)]
    out = function(*leaves, cos.to(tables), sin.to(tables))
    torch.autograd.backward(out, [dy.to(y.dtype) for y, dy in zip(out, upstream, strict=True)])
    return [*(y.detach().to(dtype) for y in out), *(x.grad for x in leaves)]


def assert_as_near_as_plain(
    arguments: tuple[torch.Tensor, ...],
    upstream: Heads,
    dtype: torch.dtype,
    tables: torch.dtype,
    backend: str,
) -> None:
    # What is given is given in the low precision, to all three.
    arguments = (*(x.to(dtype) for x in arguments[:2]), *(x.to(tables) for x in arguments[2:]))
    upstream = (upstream[0].to(dtype), upstream[1].to(dtype))
    exact = with_grads(phi3_rope, arguments, upstream, torch.float64, torch.float64)
    theirs = with_grads(phi3_rope, arguments, upstream, dtype, tables)
    with BACKENDS[backend]():
        mine = with_grads(rope, arguments, upstream, dtype, tables)
    for got, wanted, other in zip(mine, exact, theirs, strict=True):
        assert_parity(got, wanted, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("dtype", "tables"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
    ],
)
def test_value_and_gradients_are_as_near_as_plain(
    size: tuple[int, ...], dtype: torch.dtype, tables: torch.dtype, backend: str
) -> None:
    torch.manual_seed(0)
    # A factor on the tables, as YaRN has: the transposed matrix is not the inverse.
    arguments = inputs(size, factor=1.3)
    upstream = (torch.randn_like(arguments[0]), torch.randn_like(arguments[1]))
    assert_as_near_as_plain(arguments, upstream, dtype, tables, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "layout",
    ["contiguous", "fused projection", "features apart", "expanded upstream", "one table row"],
)
def test_any_strides(layout: str, backend: str) -> None:
    torch.manual_seed(0)
    q, k, cos, sin = inputs(SMALL)
    dq, dk = torch.randn_like(q), torch.randn_like(k)
    if layout == "contiguous":
        q, k = q.contiguous(), k.contiguous()
    if layout == "fused projection":
        both = torch.randn(2, 5, 7 * 8)
        q, k = (
            both[..., at].view(2, 5, -1, 8).transpose(1, 2) for at in (slice(32), slice(32, 48))
        )
    if layout == "features apart":
        q, k = (torch.randn(2, 8, 5, count).permute(0, 3, 2, 1) for count in (4, 2))
        cos, sin = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (cos, sin))
    if layout == "expanded upstream":
        dq, dk = torch.randn(1).expand(q.shape), torch.randn(1, 2, 1, 1).expand(k.shape)
    if layout == "one table row":
        cos, sin = cos[:1], sin[:1]
    assert_as_near_as_plain((q, k, cos, sin), (dq, dk), torch.float32, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_halves_of_a_table_need_not_agree(backend: str) -> None:
    torch.manual_seed(0)
    q, k, cos, sin = inputs(SMALL)
    cos, sin = torch.randn_like(cos), torch.randn_like(sin)
    upstream = (torch.randn_like(q), torch.randn_like(k))
    assert_as_near_as_plain((q, k, cos, sin), upstream, torch.float32, torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fused", [False, True])
def test_results_keep_the_memory_order(backend: str, fused: bool) -> None:
    q, k, cos, sin = inputs(SMALL)
    if fused:
        both = torch.randn(2, 5, 6 * 8)
        q, k = (
            both[..., at].view(2, 5, -1, 8).transpose(1, 2) for at in (slice(32), slice(32, 48))
        )
    with BACKENDS[backend]():
        for y in rope(q, k, cos, sin):
            assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_llama(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, cos, sin = inputs(SMALL)
    low = [x.to(dtype) for x in (q, k, cos, sin)]
    exact = llama_rope(*(x.double() for x in low))
    theirs = llama_rope(*low)
    with triton_on_cpu():
        mine = rope(*low)
    for got, wanted, other in zip(mine, exact, theirs, strict=True):
        assert_parity(got, wanted, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_in_place_equals_out_of_place(size: tuple[int, ...], backend: str) -> None:
    torch.manual_seed(0)
    q, k, cos, sin = inputs(size, factor=1.3)
    with BACKENDS[backend]():
        wanted = rope(q, k, cos, sin)
        versions = q._version, k._version
        rope_(q, k, cos, sin)
    assert torch.equal(q, wanted[0])
    assert torch.equal(k, wanted[1])
    assert q._version > versions[0]
    assert k._version > versions[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_transposed_equals_the_gradient(backend: str) -> None:
    torch.manual_seed(0)
    q, k, cos, sin = inputs(SIZES[2], factor=1.3)
    with BACKENDS[backend]():
        wanted = CATALOG["rope"].call(q, k, cos, sin, True)
        CATALOG["rope_"].call(q, k, cos, sin, True)
    assert torch.equal(q, wanted[0])
    assert torch.equal(k, wanted[1])


def test_one_launch_forward_and_one_backward() -> None:
    q, k, cos, sin = (x.to("meta") for x in inputs(SMALL))
    for transpose in (False, True):
        with recorded() as launches:
            CATALOG["rope"].triton(q, k, cos, sin, transpose)
        assert len(launches) == 1


def test_gradcheck() -> None:
    torch.manual_seed(0)
    q, k, cos, sin = (x.double() for x in inputs((1, 2, 1, 3, 6, 4), factor=1.3))
    q.requires_grad_()
    k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin), (q, k))
    assert torch.autograd.gradgradcheck(lambda q, k: rope(q, k, cos, sin), (q, k))


def test_compiles_without_a_break() -> None:
    torch.manual_seed(0)
    q, k, cos, sin = inputs(SMALL)

    def loss(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        a, b = rope(q, k, cos, sin)
        return (a**2).sum() + (b**3).sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = q.clone().requires_grad_(), k.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(*leaves), leaves))
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_equal_those_of_a_model(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    yarn["original_max_position_embeddings"] = 64
    for parameters in ({"rope_type": "default", "rope_theta": 500000.0}, yarn):
        config = LlamaConfig(
            hidden_size=64,
            num_attention_heads=4,
            max_position_embeddings=256,
            rope_parameters=parameters,
        )
        model = LlamaRotaryEmbedding(config)
        ids = torch.randint(0, 256, (2, 50))
        wanted = model(torch.empty(1, dtype=dtype), ids)
        got = rotary_tables(ids, model.inv_freq, model.attention_scaling, dtype)
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(got[1], wanted[1])


def test_what_does_not_fit_is_named() -> None:
    q, k, cos, sin = inputs(SMALL)
    with pytest.raises(KernelArgumentError, match=r"rope: shape of q is \[4, 5, 8\], wanted"):
        rope(q[0], k, cos, sin)
    with pytest.raises(KernelArgumentError, match=r"rope: shape of k is \[2, 2, 4, 8\], wanted"):
        rope(q, k[:, :, 1:], cos, sin)
    with pytest.raises(KernelArgumentError, match=r"rope: dtype of k is torch.float16"):
        rope(q, k.half(), cos, sin)
    with pytest.raises(KernelArgumentError, match=r"rope: dtype of cos is torch.bfloat16"):
        rope(q, k, cos.bfloat16(), sin.bfloat16())
    with pytest.raises(KernelArgumentError, match=r"rope: shape of cos is \[3, 5, 8\], wanted"):
        rope(q, k, cos[:1].expand(3, 5, 8), sin)
    with pytest.raises(KernelArgumentError, match=r"rope: shape of sin is \[2, 5, 6\], wanted"):
        rope(q, k, cos, sin[..., :6])
    with pytest.raises(KernelArgumentError, match=r"rope: last size of cos is 7, wanted an even"):
        rope(q, k, cos[..., :7], sin[..., :7])
    with pytest.raises(KernelArgumentError, match=r"rope: last size of cos is 10, wanted an even"):
        rope(q, k, torch.zeros(2, 5, 10), torch.zeros(2, 5, 10))
    with pytest.raises(KernelArgumentError, match=r"rope: requires_grad of cos is True"):
        rope(q, k, cos.clone().requires_grad_(), sin)
    with pytest.raises(KernelArgumentError, match=r"rope: device of k is meta"):
        rope(q, k.to("meta"), cos, sin)
    with pytest.raises(KernelArgumentError, match=r"rotary_tables: shape of position_ids is \[5\]"):
        rotary_tables(torch.arange(5), torch.ones(2), 1.0, torch.float32)
    with pytest.raises(KernelArgumentError, match=r"rotary_tables: shape of inv_freq is \[1, 2\]"):
        rotary_tables(torch.zeros(1, 5), torch.ones(1, 2), 1.0, torch.float32)


def test_in_place_refuses_what_others_read() -> None:
    q, k, cos, sin = inputs(SMALL)
    with pytest.raises(KernelArgumentError, match=r"rope_: requires_grad of q is True"):
        rope_(q.clone().requires_grad_(), k, cos, sin)
    with pytest.raises(KernelArgumentError, match=r"rope_: requires_grad of k is True"):
        rope_(q, k.clone().requires_grad_(), cos, sin)
    with pytest.raises(KernelArgumentError, match=r"rope_: strides of k is \(40, 0, 8, 1\)"):
        rope_(q, k[:, :1].contiguous().expand(2, 3, 5, 8), cos, sin)
    with pytest.raises(KernelArgumentError, match=r"rope_: strides of q is"):
        rope_(torch.zeros(2, 4, 8, 5).transpose(2, 3), k, cos, sin)
    with torch.no_grad():
        rope_(q.clone().requires_grad_(), k, cos, sin)
