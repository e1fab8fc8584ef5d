"""Gated linear units: exact, by reference and by Triton, forward and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dtune_kernels.catalog import CATALOG
from dtune_kernels.errors import KernelArgumentError
from dtune_kernels.glu import geglu, glu, swiglu
from dtune_kernels.launch import recorded

from tests.kernels.compare import assert_parity, triton_on_cpu

BACKENDS = {"reference": nullcontext, "triton": triton_on_cpu}
ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]
# In fp32 the bound compares roundings with roundings: it takes a few hundred elements.
SHAPES = [(1, 300), (7, 100), (3, 1030), (33, 128), (2, 3, 100), (0, 24)]
NARROW = [(1, 1), (5, 1), (9,), (2, 3, 5)]


def plain(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def with_grads(
    function: Callable[..., torch.Tensor],
    inputs: tuple[torch.Tensor, torch.Tensor],
    upstream: torch.Tensor,
    activation: str,
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    gate, up = (x.detach().to(dtype).requires_grad_() for x in inputs)
    h = function(gate, up, activation)
    dgate, dup = torch.autograd.grad(h, (gate, up), upstream.to(dtype).expand(h.shape))
    return [h.detach(), dgate, dup]


def assert_as_near_as_plain(
    inputs: tuple[torch.Tensor, torch.Tensor],
    upstream: torch.Tensor,
    activation: str,
    backend: str,
) -> None:
    dtype = inputs[0].dtype
    exact = with_grads(plain, inputs, upstream, activation, torch.float64)
    theirs = with_grads(plain, inputs, upstream, activation, dtype)
    with BACKENDS[backend]():
        mine = with_grads(glu, inputs, upstream, activation, dtype)
    for got, wanted, other in zip(mine, exact, theirs, strict=True):
        assert_parity(got, wanted, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradients_are_as_near_as_plain(
    shape: tuple[int, ...], activation: str, dtype: torch.dtype, backend: str
) -> None:
    torch.manual_seed(0)
    gate, up, dh = (torch.randn(shape).to(dtype) for _ in range(3))
    assert_as_near_as_plain((gate, up), dh, activation, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", NARROW)
def test_narrow_rows_are_as_near_as_plain(shape: tuple[int, ...], backend: str) -> None:
    torch.manual_seed(0)
    gate, up, dh = (torch.randn(shape).half() for _ in range(3))
    assert_as_near_as_plain((gate, up), dh, "silu", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_sided_gates_are_as_near_as_plain(activation: str, backend: str) -> None:
    torch.manual_seed(0)
    up, dh = torch.randn(1, 600), torch.randn(1, 600)
    for ends in ((-5, -1), (1, 5)):
        assert_as_near_as_plain((torch.linspace(*ends, 600)[None], up), dh, activation, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_gates_are_shut_or_open(activation: str, backend: str) -> None:
    torch.manual_seed(0)
    up, dh = torch.randn(2, 50), torch.randn(2, 50)
    gate = torch.tensor([[-300.0], [300.0]]).expand(2, 50)
    with BACKENDS[backend]():
        h, dgate, dup = with_grads(glu, (gate, up), dh, activation, torch.float32)
    opened = gate.clamp(min=0)
    assert torch.equal(h, opened * up)
    assert torch.equal(dgate, dh * up * opened.sign())
    assert torch.equal(dup, dh * opened)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["halves", "transposed", "expanded", "expanded upstream"])
def test_any_strides(layout: str, backend: str) -> None:
    torch.manual_seed(0)
    gate, up, dh = (torch.randn(2, 3, 100) for _ in range(3))
    if layout == "halves":
        gate, up = torch.randn(2, 3, 200).chunk(2, dim=-1)
    if layout == "transposed":
        gate, up = (torch.randn(100, 3, 2).permute(2, 1, 0) for _ in range(2))
    if layout == "expanded":
        gate, up = torch.randn(1, 1, 100).expand(2, 3, 100), torch.randn(2, 3, 1).expand(2, 3, 100)
    if layout == "expanded upstream":
        dh = torch.randn(1)
    assert_as_near_as_plain((gate, up), dh, "silu", backend)


def test_halves_are_not_copied() -> None:
    gate, up = torch.zeros(2, 3, 80).chunk(2, dim=-1)
    gate.requires_grad_()
    saved: list[torch.Tensor] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        swiglu(gate, up)
    assert [x.data_ptr() for x in saved] == [gate.data_ptr(), up.data_ptr()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_h_is_computed_again_to_the_bit(activation: str, backend: str) -> None:
    torch.manual_seed(0)
    dh, gate, up = (torch.randn(5, 70).half() for _ in range(3))
    with BACKENDS[backend]():
        h = CATALOG["glu"].call(gate, up, activation)
        dgate, dup, again = CATALOG["glu_backward"].call(dh, gate, up, activation, True)
        alone = CATALOG["glu_backward"].call(dh, gate, up, activation, False)
    assert torch.equal(again, h)
    assert torch.equal(alone[0], dgate)
    assert torch.equal(alone[1], dup)
    assert alone[2].numel() == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(activation: str, backend: str) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(3, 4, dtype=torch.double, requires_grad=True) for _ in range(2))
    with BACKENDS[backend]():
        assert torch.autograd.gradcheck(lambda *a: glu(*a, activation), (gate, up))


def test_names_choose_the_activation() -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(swiglu(gate, up), glu(gate, up, "silu"))
    assert torch.equal(geglu(gate, up, tanh=True), glu(gate, up, "gelu_tanh"))
    assert torch.equal(geglu(gate, up, tanh=False), glu(gate, up, "gelu"))


@pytest.mark.parametrize("name", ["glu", "glu_backward"])
def test_one_launch_with_offsets_beyond_31_bits(name: str) -> None:
    rows = torch.empty(2**17, 2**15, dtype=torch.float16, device="meta")
    arguments: dict[str, tuple[Any, ...]] = {
        "glu": (rows, rows, "silu"),
        "glu_backward": (rows, rows, rows, "silu", True),
    }
    with recorded() as launches:
        CATALOG[name].triton(*arguments[name])
    ((_, grid, _, options),) = launches
    assert grid[0] * options["ROWS"] * options["BLOCK"] == rows.numel()


def test_compiles_without_a_break() -> None:
    torch.manual_seed(0)
    gate, up = torch.randn(3, 4), torch.randn(3, 4)

    def loss(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return (swiglu(gate, up) ** 2).sum()

    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = gate.clone().requires_grad_(), up.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(*leaves), leaves))
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted)


def test_what_does_not_fit_is_named() -> None:
    x = torch.zeros(2, 6)
    with pytest.raises(KernelArgumentError, match=r"glu: activation is relu, wanted \('silu'"):
        glu(x, x, "relu")
    with pytest.raises(KernelArgumentError, match=r"glu: dtype of gate is torch.int64"):
        swiglu(x.long(), x)
    with pytest.raises(KernelArgumentError, match=r"glu: dtype of up is torch.float16"):
        swiglu(x, x.half())
    with pytest.raises(KernelArgumentError, match=r"glu: shape of up is \[1, 6\], wanted \[2, 6\]"):
        geglu(x, x[:1], tanh=True)
    with pytest.raises(KernelArgumentError, match=r"glu: shape of gate is \[\], wanted"):
        swiglu(torch.zeros(()), torch.zeros(()))
    with pytest.raises(KernelArgumentError, match=r"glu: device of up is meta"):
        swiglu(x, x.to("meta"))
