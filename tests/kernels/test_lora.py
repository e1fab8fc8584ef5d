"""Linears with adapters: exact, by reference and by Triton, forward and every gradient."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from dtune_kernels.lora import Adapter, Linear, Norm, lora_linear, lora_linears
from dtune_kernels.rms_norm import rms_norm
from dtune_kernels.weights import FrozenWeight

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

DTYPES = [torch.float32, torch.float16]
QKV = ((16,), (), (3, 8))
"""Ranks of each linear: one that has no adapter, one with two."""
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_backend = pytest.mark.parametrize("backend", ["reference", "triton"])


@dataclass(frozen=True)
class Case:
    """A group, its input, the gradients that come back, and the norm before it."""

    linears: Sequence[Linear]
    x: torch.Tensor
    upstream: Sequence[torch.Tensor]
    norm: Norm | None = None


def case(
    ranks: Sequence[Sequence[int]],
    *,
    sizes: Sequence[int] = (24, 40, 17),
    rows: int = 19,
    inputs: int = 36,
    dropout: float = 0,
    norm: str = "",
) -> Case:
    torch.manual_seed(0)
    linears = [
        linear(size, inputs, own, bias=index != 1, dropout=dropout)
        for index, (size, own) in enumerate(zip(sizes, ranks, strict=False))
    ]
    x = torch.randn(rows, inputs)
    upstream = [torch.randn(rows, size) for size in sizes[: len(ranks)]]
    weight = 0.5 + torch.rand(inputs)
    return Case(linears, x, upstream, Norm(weight, EPS, norm == "gemma") if norm else None)


def run(case: Case, dtype: torch.dtype, *, ours: bool) -> list[torch.Tensor]:
    """The results, then the gradients of x, of the norm's weight and of all leaves."""
    linears = [cast(one, dtype, train_bias=index == 0) for index, one in enumerate(case.linears)]
    x, norm = leaf(case.x, dtype), case.norm
    if norm is not None:
        norm = replace(norm, weight=leaf(norm.weight, dtype))
    found = drawn(7)
    if ours:
        ys = lora_linears(x, linears, norm=norm)
    else:
        rows = x.shape[:-1].numel()
        ys = formula(norm_formula(x, norm), linears, masks(found, linears, rows))
    upstream = [dy.to(dtype).expand(y.shape) for dy, y in zip(case.upstream, ys, strict=True)]
    torch.autograd.backward(ys, upstream)
    trained = [x, *([] if norm is None else [norm.weight]), *leaves(linears)]
    return [*(y.detach() for y in ys), *(each.grad for each in trained)]


def assert_as_near_as_plain(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Judge our results by the formula's in fp64 and in the dtype, from the same values."""
    norm = case.norm and replace(case.norm, weight=case.norm.weight.to(dtype))
    case = Case(
        [rounded(one, dtype) for one in case.linears],
        case.x.to(dtype),
        [dy.to(dtype) for dy in case.upstream],
        norm,
    )
    exact, plain = run(case, torch.float64, ours=False), run(case, dtype, ours=False)
    if backend == "triton":
        with triton_on_cpu():
            mine = run(case, dtype, ours=True)
    else:
        mine = run(case, dtype, ours=True)
    for got, wanted, other in zip(mine, exact, plain, strict=True):
        assert_parity(got, wanted, other)


@each_backend
@each_dtype
@pytest.mark.parametrize("dropout", [0, 0.1])
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 64, 100])
def test_one_linear_is_as_near_as_plain(
    rank: int, dropout: float, dtype: torch.dtype, backend: str
) -> None:
    assert_as_near_as_plain(case([[rank]], dropout=dropout), dtype, backend)


@each_backend
@each_dtype
@pytest.mark.parametrize("dropout", [0, 0.1])
@pytest.mark.parametrize("norm", ["", "llama", "gemma"])
def test_a_group_is_as_near_as_plain(
    norm: str, dropout: float, dtype: torch.dtype, backend: str
) -> None:
    assert_as_near_as_plain(case(QKV, norm=norm, dropout=dropout), dtype, backend)


@each_dtype
def test_many_tiles_and_shares(dtype: torch.dtype) -> None:
    ranks = ((16,), (8,), (3,))
    one = case(ranks, sizes=(600, 300, 20), rows=300, inputs=600, dropout=0.1)
    assert_as_near_as_plain(one, dtype, "triton")


@each_dtype
@pytest.mark.parametrize("ranks", [((256,), (16, 100), ()), ((130, 300),)])
def test_ranks_that_take_several_passes(ranks: Sequence[Sequence[int]], dtype: torch.dtype) -> None:
    assert_as_near_as_plain(
        case(ranks, sizes=(150, 70, 20), rows=70, inputs=90, dropout=0.1), dtype, "triton"
    )


@each_backend
@pytest.mark.parametrize("rows", [1, 64, 0])
def test_few_rows(rows: int, backend: str) -> None:
    assert_as_near_as_plain(case(QKV, rows=rows), torch.float32, backend)


@each_backend
@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded", "three dimensions"])
def test_any_strides(layout: str, backend: str) -> None:
    one = case(QKV, norm="llama", dropout=0.1)
    x, upstream = one.x, list(one.upstream)
    if layout == "strided":
        x = torch.randn(19, 72)[:, :36]
        upstream = [torch.randn(19, 2 * dy.shape[1])[:, ::2] for dy in upstream]
    if layout == "transposed":
        x = torch.randn(36, 19).t()
        upstream = [torch.randn(dy.shape[1], 19).t() for dy in upstream]
    if layout == "expanded":
        upstream = [dy[:1] for dy in upstream]
    if layout == "three dimensions":
        x = torch.randn(5, 3, 36).transpose(0, 1)
        upstream = [torch.randn(3, 5, dy.shape[1]) for dy in upstream]
    assert_as_near_as_plain(replace(one, x=x, upstream=upstream), torch.float32, backend)


def test_one_dimension_is_one_row() -> None:
    one = case(QKV, norm="llama", rows=1)
    flat = replace(one, x=one.x[0], upstream=[dy[0] for dy in one.upstream])
    results = zip(
        run(flat, torch.float32, ours=True), run(one, torch.float32, ours=True), strict=True
    )
    assert all(torch.equal(mine.view(other.shape), other) for mine, other in results)


@each_backend
def test_adapters_may_have_any_strides(backend: str) -> None:
    one = case(QKV)
    linears = [
        replace(
            each,
            adapters=tuple(
                replace(own, a=own.a.t().contiguous().t(), b=own.b.t().contiguous().t())
                for own in each.adapters
            ),
        )
        for each in one.linears
    ]
    assert_as_near_as_plain(replace(one, linears=linears), torch.float32, backend)


@each_backend
@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize(
    ("of_h", "of_weight", "of_products"),
    [
        (torch.float16, torch.float16, torch.float16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float32, torch.float16),
    ],
)
def test_a_folded_norm_is_the_norm_before(
    of_h: torch.dtype, of_weight: torch.dtype, of_products: torch.dtype, gemma: bool, backend: str
) -> None:
    torch.manual_seed(0)
    base = [rounded(linear(24, 36, ranks, dropout=0.1), of_products) for ranks in ((4,), (3, 2))]
    h, weight, dy = torch.randn(19, 36), torch.rand(36), torch.randn(19, 24).to(of_products)

    def run(*, folded: bool) -> list[torch.Tensor]:
        linears = [cast(one, of_products) for one in base]
        x, own = leaf(h, of_h), leaf(weight, of_weight)
        torch.manual_seed(1)
        with torch.autocast("cpu", of_products, enabled=of_h != of_products):
            if folded:
                ys = lora_linears(x, linears, norm=Norm(own, EPS, gemma))
            else:
                normed = rms_norm(x, own, eps=EPS, gemma=gemma)
                ys = lora_linears(normed.to(of_products), linears)
        torch.autograd.backward(ys, [dy] * 2)
        return [*(y.detach() for y in ys), *(each.grad for each in (x, own, *leaves(linears)))]

    with triton_on_cpu() if backend == "triton" else nullcontext():
        got, expected = run(folded=True), run(folded=False)
    for mine, wanted in zip(got, expected, strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("dropout", [0, 0.3])
@pytest.mark.parametrize("norm", [False, True])
def test_gradcheck(norm: bool, dropout: float) -> None:
    torch.manual_seed(0)
    linears = [
        cast(linear(4, 6, ranks, bias=True, dropout=dropout), torch.float64)
        for ranks in ((2,), (), (1, 3))
    ]
    x = torch.randn(5, 6, dtype=torch.double, requires_grad=True)
    weight = torch.rand(6, dtype=torch.double, requires_grad=True)

    def function(*_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(3)
        return lora_linears(x, linears, norm=Norm(weight, EPS, False) if norm else None)

    assert torch.autograd.gradcheck(function, (x, *([weight] if norm else []), *leaves(linears)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_scale_counts_once_in_every_gradient(dtype: torch.dtype) -> None:
    def grads(scale: float) -> list[torch.Tensor]:
        torch.manual_seed(0)
        one = cast(linear(7, 5, (2,)), dtype)
        one = replace(one, adapters=(replace(one.adapters[0], scale=scale),))
        x = torch.randn(3, 5, dtype=dtype, requires_grad=True)
        y = lora_linear(x, one)
        assert isinstance(one.weight, torch.Tensor)
        (y - x @ one.weight.t()).sum().backward()
        return [leaf.grad for leaf in (x, *leaves([one])) if leaf.grad is not None]

    # x gets its base product's gradient twice, with both signs.
    for single, fourfold in zip(grads(1.0), grads(4.0), strict=True):
        torch.testing.assert_close(fourfold, 4 * single)


@each_backend
def test_b_of_zeros_gives_da_zero_and_db_not(backend: str) -> None:
    torch.manual_seed(0)
    one = cast(linear(24, 36, (4,)), torch.float32)
    torch.nn.init.zeros_(one.adapters[0].b.detach())
    if backend == "triton":
        with triton_on_cpu():
            lora_linear(torch.randn(5, 36), one).square().sum().backward()
    else:
        lora_linear(torch.randn(5, 36), one).square().sum().backward()
    a, b = leaves([one])
    assert a.grad is not None
    assert b.grad is not None
    assert not a.grad.any()
    assert b.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_have_the_dtypes_of_what_they_belong_to(dtype: torch.dtype) -> None:
    one = linear(24, 36, (4,), bias=True)
    adapter = one.adapters[0]
    a, b = leaf(adapter.a, torch.float32), leaf(adapter.b, torch.float16)
    bias = leaf(one.bias, torch.float32)
    x = torch.randn(5, 36, dtype=dtype, requires_grad=True)
    y = lora_linear(x, Linear(one.weight.half(), bias, (Adapter(a, b, 2.0),)))
    y.sum().backward()
    assert y.dtype == dtype
    for each in (x, a, b, bias):
        assert each.grad is not None
        assert each.grad.dtype == each.dtype


def test_autocast_sets_the_dtype_of_the_products() -> None:
    one, norm = (
        cast(linear(24, 36, (4,), bias=True), torch.float32),
        Norm(torch.ones(36), EPS, False),
    )
    x = torch.randn(5, 36, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, normed = lora_linear(x, one), lora_linear(x, one, norm=norm)
    assert y.dtype == normed.dtype == torch.bfloat16
    assert torch.equal(y, lora_linear(x.bfloat16(), one))
    torch.autograd.backward([y, normed], [torch.ones_like(y)] * 2)
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def saved(function, *inputs) -> int:  # type: ignore[no-untyped-def]
    """Elements that are kept for the backward, without parameters."""
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    for each in inputs:
        kept.pop(each.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def test_only_x_and_p_are_kept() -> None:
    linears = [cast(linear(24, 36, ranks), torch.float32) for ranks in ((4,), (), (3, 2))]
    x = torch.randn(50, 36, requires_grad=True)
    weights = [one.weight for one in linears]
    parameters = (*weights, *leaves(linears))
    norm = Norm(torch.ones(36), EPS, False)
    assert saved(lambda: lora_linears(x, linears), *parameters) == 50 * (36 + 9)
    folded = saved(lambda: lora_linears(x, linears, norm=norm), *parameters, norm.weight)
    assert folded == 50 * (36 + 9 + 1)


def test_without_trained_a_x_is_not_kept() -> None:
    one = cast(linear(24, 36, (4,)), torch.float32)
    one.adapters[0].a.requires_grad_(False)
    x = torch.randn(50, 36, requires_grad=True)
    parameters = (one.weight, one.adapters[0].a, one.adapters[0].b)
    assert saved(lambda: lora_linear(x, one), *parameters) == 50 * 4
    lora_linear(x, one).sum().backward()
    assert x.grad is not None
    assert one.adapters[0].a.grad is None
    assert one.adapters[0].b.grad is not None


def test_a_frozen_linear_keeps_nothing_and_only_passes_the_gradient_on() -> None:
    one = cast(linear(24, 36), torch.float32)
    x = torch.randn(50, 36, requires_grad=True)
    assert saved(lambda: lora_linear(x, one), one.weight) == 0


def test_evaluation_keeps_nothing() -> None:
    one = cast(linear(24, 36, (4,)), torch.float32)
    with torch.no_grad():
        assert saved(lambda: lora_linear(torch.randn(50, 36), one)) == 0
        assert not lora_linear(torch.randn(50, 36), one).requires_grad


def test_x_that_needs_no_gradient_gets_none() -> None:
    one = cast(linear(24, 36, (4,)), torch.float32)
    x = torch.randn(50, 36)
    lora_linear(x, one).sum().backward()
    assert x.grad is None
    assert one.adapters[0].a.grad is not None


@each_backend
def test_a_quantized_weight_is_dequantized_for_each_use(backend: str) -> None:
    torch.manual_seed(0)
    one = cast(linear(24, 36, (4,), bias=True), torch.float32)
    assert isinstance(one.weight, torch.Tensor)
    x, dy = torch.randn(5, 36), torch.randn(5, 24)

    def grads(weight: FrozenWeight) -> list[torch.Tensor]:
        own = leaf(x, torch.float32)
        y = lora_linear(own, replace(cast(one, torch.float32), weight=weight))
        y.backward(dy)
        assert own.grad is not None
        return [y.detach(), own.grad]

    expected = grads(one.weight)
    if backend == "triton":
        with triton_on_cpu():
            got = grads(HalfWeight.of(one.weight))
    else:
        got = grads(HalfWeight.of(one.weight))
    for mine, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, wanted)
