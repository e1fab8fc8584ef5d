"""Gated MLPs with adapters: exact, by reference and by Triton, forward and every gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from dtune_kernels.errors import KernelArgumentError
from dtune_kernels.lora import Linear, Norm, lora_mlp

from tests.kernels.compare import assert_parity, triton_on_cpu
from tests.kernels.lora_cases import (
    EPS,
    HalfWeight,
    cast,
    drawn,
    formula,
    leaf,
    leaves,
    linear,
    masks,
    norm_formula,
    rounded,
)

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
each_backend = pytest.mark.parametrize("backend", ["reference", "triton"])


@dataclass(frozen=True)
class Case:
    """gate, up and down, their input, the gradient that comes back, and the norm before them."""

    linears: Sequence[Linear]
    x: torch.Tensor
    dy: torch.Tensor
    norm: Norm | None = None
    activation: str = "silu"


def case(
    ranks: Sequence[Sequence[int]] = ((16,), (3,), (8,)),
    *,
    rows: int = 19,
    width: int = 36,
    features: int = 52,
    bias: bool = False,
    dropout: float = 0,
    norm: bool = False,
) -> Case:
    torch.manual_seed(0)
    sizes = ((features, width), (features, width), (width, features))
    linears = [
        linear(*size, own, bias=bias, dropout=dropout)
        for size, own in zip(sizes, ranks, strict=True)
    ]
    x, dy = torch.randn(rows, width), torch.randn(rows, width)
    return Case(linears, x, dy, Norm(0.5 + torch.rand(width), EPS, False) if norm else None)


def plain(
    x: torch.Tensor, linears: Sequence[Linear], activation: str, seeds: torch.Tensor
) -> torch.Tensor:
    rows = x.shape[:-1].numel()
    gate, up = formula(x, linears[:2], masks(seeds[:1], linears[:2], rows))
    h = ACTIVATIONS[activation](gate) * up
    return formula(h, linears[2:], masks(seeds[1:], linears[2:], rows))[0]


def run(case: Case, dtype: torch.dtype, *, ours: bool) -> list[torch.Tensor]:
    """The result, then the gradients of x, of the norm's weight and of all leaves."""
    linears = [cast(one, dtype, train_bias=index != 1) for index, one in enumerate(case.linears)]
    x, norm = leaf(case.x, dtype), case.norm
    if norm is not None:
        norm = replace(norm, weight=leaf(norm.weight, dtype))
    seeds = drawn(7, 2)
    if ours:
        y = lora_mlp(x, *linears, activation=case.activation, norm=norm)
    else:
        y = plain(norm_formula(x, norm), linears, case.activation, seeds)
    y.backward(case.dy.to(dtype).expand(y.shape))
    trained = [x, *([] if norm is None else [norm.weight]), *leaves(linears)]
    return [y.detach(), *(each.grad for each in trained)]


def assert_as_near_as_plain(case: Case, dtype: torch.dtype, backend: str) -> None:
    case = replace(
        case,
        linears=[rounded(one, dtype) for one in case.linears],
        x=case.x.to(dtype),
        dy=case.dy.to(dtype),
        norm=case.norm and replace(case.norm, weight=case.norm.weight.to(dtype)),
    )
    exact, other = run(case, torch.float64, ours=False), run(case, dtype, ours=False)
    if backend == "triton":
        with triton_on_cpu():
            mine = run(case, dtype, ours=True)
    else:
        mine = run(case, dtype, ours=True)
    for got, wanted, theirs in zip(mine, exact, other, strict=True):
        assert_parity(got, wanted, theirs)


@each_backend
@each_dtype
@pytest.mark.parametrize("dropout", [0, 0.1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation_is_as_near_as_plain(
    activation: str, dropout: float, dtype: torch.dtype, backend: str
) -> None:
    assert_as_near_as_plain(replace(case(dropout=dropout), activation=activation), dtype, backend)


@each_backend
@each_dtype
@pytest.mark.parametrize(
    "ranks",
    [((), (), ()), ((4,), (), ()), ((), (4,), ()), ((), (), (4,)), ((4, 3), (2, 40), (1, 5))],
)
def test_partial_and_several_adapters(
    ranks: Sequence[Sequence[int]], dtype: torch.dtype, backend: str
) -> None:
    assert_as_near_as_plain(case(ranks, norm=True, bias=True, dropout=0.1), dtype, backend)


@each_dtype
def test_many_tiles(dtype: torch.dtype) -> None:
    ranks = ((100,), (33,), (70,))
    assert_as_near_as_plain(
        case(ranks, rows=70, width=70, features=200, dropout=0.1), dtype, "triton"
    )


@each_backend
@pytest.mark.parametrize("layout", ["strided", "expanded", "three dimensions", "one row", "empty"])
def test_any_strides(layout: str, backend: str) -> None:
    one = case(norm=True, dropout=0.1)
    x, dy = one.x, one.dy
    if layout == "strided":
        x, dy = torch.randn(19, 72)[:, :36], torch.randn(36, 19).t()
    if layout == "expanded":
        dy = dy[:1]
    if layout == "three dimensions":
        x, dy = torch.randn(5, 3, 36).transpose(0, 1), torch.randn(3, 5, 36)
    if layout == "one row":
        x, dy = x[:1], dy[:1]
    if layout == "empty":
        x, dy = x[:0], dy[:0]
    assert_as_near_as_plain(replace(one, x=x, dy=dy), torch.float32, backend)


@pytest.mark.parametrize("dropout", [0, 0.3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str, dropout: float) -> None:
    one = case(((2,), (1, 2), (2,)), rows=3, width=4, features=5, bias=True, dropout=dropout)
    linears = [cast(each, torch.float64) for each in one.linears]
    x = leaf(one.x, torch.float64)
    weight = torch.rand(4, dtype=torch.double, requires_grad=True)

    def function(*_: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return lora_mlp(x, *linears, activation=activation, norm=Norm(weight, EPS, True))

    assert torch.autograd.gradcheck(function, (x, weight, *leaves(linears)))


# NumPy says so where the sigmoid is 0, as it should be.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_inputs_neither_overflow_nor_give_nan() -> None:
    one = case()
    x = 1e4 * one.x.requires_grad_()
    for activation in ACTIVATIONS:
        with triton_on_cpu():
            y = lora_mlp(x, *one.linears, activation=activation)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.isfinite(y).all()
        assert torch.isfinite(grad).all()


def test_quantized_weights_are_dequantized_for_each_use() -> None:
    one = case(norm=True)
    x = one.x.requires_grad_()
    kept = [
        replace(each, weight=HalfWeight.of(each.weight))
        for each in one.linears
        if isinstance(each.weight, torch.Tensor)
    ]
    y, other = (lora_mlp(x, *own, activation="silu", norm=one.norm) for own in (one.linears, kept))
    torch.testing.assert_close(other, y)
    grads = [torch.autograd.grad(each.sum(), x)[0] for each in (y, other)]
    torch.testing.assert_close(grads[1], grads[0])


def test_x_and_the_base_outputs_of_gate_and_up_are_kept() -> None:
    one = case()
    linears = [cast(each, torch.float32) for each in one.linears]
    parameters = {id(p) for p in [*leaves(linears), *(each.weight for each in linears)]}
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if id(x) not in parameters:
            kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        lora_mlp(one.x, *linears, activation="silu")
    assert sum(kept.values()) == 19 * (36 + 2 * 52 + 16 + 3 + 8)


def test_what_does_not_fit_is_named() -> None:
    gate, up, down = case().linears
    x = torch.zeros(2, 36)
    with pytest.raises(KernelArgumentError, match="lora_mlp: activation is relu, wanted"):
        lora_mlp(x, gate, up, down, activation="relu")
    with pytest.raises(KernelArgumentError, match="features of up is 51, wanted 52"):
        lora_mlp(x, gate, linear(51, 36), down, activation="silu")
    with pytest.raises(KernelArgumentError, match=r"shape of down.weight is \[36, 51\]"):
        lora_mlp(x, gate, up, linear(36, 51), activation="silu")
    trained = replace(down, weight=torch.zeros(36, 52, requires_grad=True))
    with pytest.raises(KernelArgumentError, match=r"down.weight is a trained weight"):
        lora_mlp(x, gate, up, trained, activation="silu")
