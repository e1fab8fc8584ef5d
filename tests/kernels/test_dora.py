"""DoRA: exact, by reference and by Triton; equal to PEFT's without dropout."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from dtune_kernels.check import errors
from dtune_kernels.dora import dora_linear, ops, reference
from dtune_kernels.errors import KernelArgumentError
from dtune_kernels.lora import Adapter, Linear, Norm
from peft import LoraConfig, get_peft_model
from torch.nn.functional import linear

from tests.kernels.compare import assert_parity, triton_on_cpu

EPS = 1e-6
DTYPES = [torch.float32, torch.float16]
both_backends = pytest.mark.parametrize("backend", ["reference", "triton"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def on(backend: str):  # type: ignore[no-untyped-def]
    return triton_on_cpu() if backend == "triton" else nullcontext()


def assert_near(got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    """Parity; in fp32, where plain errs by one rounding or by four as it happens, with four."""
    if got.dtype == torch.float32 and exact.any():
        four = (exact * (1 + 2 * torch.finfo(torch.float32).eps)).float()
        plain = max(plain, four, key=lambda x: errors(x, exact)[1])
    assert_parity(got, exact, plain)


def adapter(features: int, out: int, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """W, A, B and the magnitude; adapters in fp32, the others in the dtype."""
    weight = (torch.randn(out, features) / features**0.5).to(dtype)
    a = torch.randn(rank, features) / features**0.5
    b = torch.randn(out, rank) / rank**0.5
    return weight, a, b, 1 + torch.rand(out)


def double(*values: Any) -> list[Any]:
    return [x.double() if isinstance(x, torch.Tensor) else x for x in values]


@each_dtype
@pytest.mark.parametrize("scale", [0.0, 2.0])
@pytest.mark.parametrize(
    ("out", "features", "rank"), [(1, 24, 4), (70, 300, 16), (33, 129, 1), (5, 40, 100), (64, 1, 3)]
)
@both_backends
def test_norm(
    backend: str, out: int, features: int, rank: int, scale: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight, a, b, _ = adapter(features, out, rank, dtype)
    arguments = (weight, a.to(dtype), b.to(dtype), scale)
    with on(backend):
        got = ops.norm(*arguments)
    assert_near(got, reference.norm(*double(*arguments)), reference.plain_norm(*arguments))


@pytest.mark.parametrize("transposed", ["weight rows", "a", "b"])
def test_norm_of_any_strides(transposed: str) -> None:
    torch.manual_seed(0)
    weight, a, b, _ = adapter(40, 20, 4, torch.float32)
    exact = reference.norm(*double(weight, a, b, 0.5))
    if transposed == "weight rows":
        weight = torch.cat([weight, weight], dim=1)[:, :40]
    if transposed == "a":
        a = a.t().contiguous().t()
    if transposed == "b":
        b = b.t().contiguous().t()
    with triton_on_cpu():
        got = ops.norm(weight, a, b, 0.5)
    assert_near(got, exact, reference.plain_norm(weight, a, b, 0.5))


@each_dtype
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "out", "rank"), [(1, 24, 4), (70, 140, 16), (600, 33, 1), (5, 40, 100), (0, 24, 4)]
)
@both_backends
def test_scaled_output_and_its_gradients(
    backend: str, rows: int, out: int, rank: int, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    y0, dy = torch.randn(rows, out).to(dtype), torch.randn(rows, out).to(dtype)
    # Both backends see what the GPU's tensor cores see.
    p, b = torch.randn(rows, rank).to(dtype).float(), torch.randn(out, rank).to(dtype).float()
    gain, norm = 1 + torch.rand(out), 1 + torch.rand(out)
    forward = (y0, p, b, 0.5, gain, torch.randn(out).to(dtype) if bias else None)
    backward = (dy, y0, p, b, 0.5, gain, norm)
    with on(backend):
        got = [ops.scaled(*forward), *ops.scaled_backward(*backward)]
    exact = [reference.scaled(*double(*forward)), *reference.scaled_backward(*double(*backward))]
    plain = [
        reference.plain_scaled(*forward),
        *reference.plain_scaled_backward(*backward),
    ]
    for mine, wanted, theirs in zip(got, exact, plain, strict=True):
        assert_near(mine, wanted, theirs)


@both_backends
def test_the_magnitudes_gradient_follows_from_the_output_alone(backend: str) -> None:
    torch.manual_seed(0)
    y0, dy = torch.randn(70, 40), torch.randn(70, 40)
    p, b, norm = torch.randn(70, 4), torch.randn(40, 4), 1 + torch.rand(40)
    magnitude = 1 + torch.rand(40)
    gain = magnitude / norm
    with on(backend):
        y = ops.scaled(y0, p, b, 0.5, gain, None)
        dv, dm = ops.scaled_backward(dy, y, None, None, 0.0, gain, magnitude)
    wanted = reference.scaled_backward(*double(dy, y0, p, b, 0.5, gain, norm))
    plain = reference.plain_scaled_backward(dy, y0, p, b, 0.5, gain, norm)
    assert_near(dv, wanted[0], plain[0])
    assert_near(dm, wanted[1], plain[1])


class Halved:
    """A quantised weight as ``QuantizedWeight`` wants it, exact: half of W is kept."""

    def __init__(self, half: torch.Tensor, calls: list[torch.dtype]) -> None:
        self.half, self.calls = half, calls
        self.shape = (half.shape[0], half.shape[1])

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        self.calls.append(dtype)
        return (2 * self.half).to(dtype)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.half,)

    def with_tensors(self, tensors: tuple[torch.Tensor, ...]) -> Halved:
        return Halved(tensors[0], self.calls)


def plain_dora(  # type: ignore[no-untyped-def]
    x, a, b, magnitude, weight, bias, norm_weight, *, scale
) -> torch.Tensor:
    """DoRA as PEFT writes it, without dropout; adapters are cast as under autocast."""
    if norm_weight is not None:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        x = norm_weight * normed.to(x.dtype)
    a, b = a.to(x.dtype), b.to(x.dtype)
    norm = torch.linalg.norm(weight + scale * (b @ a), dim=1).detach()
    factor = (magnitude / norm.to(magnitude.dtype)).to(x.dtype)
    base = linear(x, weight)
    result = (factor - 1) * base + factor * linear(linear(x, a), b) * scale
    return base + result if bias is None else base + bias + result


def ours(  # type: ignore[no-untyped-def]
    x, a, b, magnitude, weight, bias, norm_weight, *, scale, dropout=0.0
) -> torch.Tensor:
    norm = None if norm_weight is None else Norm(norm_weight, EPS, False)
    own = Linear(weight, bias, (Adapter(a, b, scale, dropout),))
    return dora_linear(x, own, magnitude, norm=norm)


def with_grads(function, inputs, frozen, dtype, upstream, **options):  # type: ignore[no-untyped-def]
    """Result and gradients of x, A, B and the magnitude, of which all but x are masters."""
    x, *rest = inputs
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [x.detach().to(dtype), *(each.detach().to(wide) for each in rest)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    weight, bias, norm_weight = (None if each is None else each.to(dtype) for each in frozen)
    y = function(*leaves, weight, bias, norm_weight, **options)
    y.backward(upstream.to(y.dtype).expand(y.shape))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def layer(size: tuple[int, ...], out: int, rank: int, dtype: torch.dtype, **frozen: bool):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    features = size[-1]
    weight, a, b, magnitude = adapter(features, out, rank, dtype)
    # Values that fp16 has, so that its rounding of adapters is not what is compared.
    inputs = (torch.randn(size).to(dtype), a.half().float(), b.half().float(), magnitude)
    bias = torch.randn(out).to(dtype) if frozen.get("bias") else None
    norm = (1 + torch.rand(features)).to(dtype) if frozen.get("norm") else None
    return inputs, (weight, bias, norm)


@each_dtype
@pytest.mark.parametrize("frozen", [{}, {"bias": True}, {"norm": True}], ids=["", "bias", "norm"])
@pytest.mark.parametrize("size", [(1, 24), (70, 40), (2, 3, 33), (0, 24)])
@both_backends
def test_linear_and_every_gradient_are_as_near_as_plain(
    backend: str, size: tuple[int, ...], frozen: dict[str, bool], dtype: torch.dtype
) -> None:
    inputs, fixed = layer(size, 48, 5, dtype, **frozen)
    for upstream in (torch.randn(*size[:-1], 48).to(dtype), torch.tensor(0.5)):
        exact = with_grads(plain_dora, inputs, fixed, torch.float64, upstream, scale=2.0)
        theirs = with_grads(plain_dora, inputs, fixed, dtype, upstream, scale=2.0)
        with on(backend):
            mine = with_grads(ours, inputs, fixed, dtype, upstream, scale=2.0)
        for got, wanted, other in zip(mine, exact, theirs, strict=True):
            assert_near(got, wanted, other)


@pytest.mark.parametrize("bias", [False, True])
def test_equal_to_peft(bias: bool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 48, bias=bias)).double()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=True)
    module = get_peft_model(model, config).base_model.model[0].double()
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    magnitude = module.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        b.normal_()
        magnitude.mul_(1 + torch.rand_like(magnitude))
    base = module.get_base_layer()
    x, dy = torch.randn(7, 24).double(), torch.randn(7, 48).double()
    leaves = (x.requires_grad_(), a, b, magnitude)
    theirs = module(x)
    mine = ours(*leaves, base.weight, base.bias, None, scale=2.0)
    torch.testing.assert_close(mine, theirs)
    wanted = torch.autograd.grad(theirs, leaves, dy)
    for got, expected in zip(torch.autograd.grad(mine, leaves, dy), wanted, strict=True):
        torch.testing.assert_close(got, expected)


def test_a_fresh_adapter_leaves_the_base_layer_as_it_is() -> None:
    (x, a, b, _), (weight, bias, _) = layer((6, 24), 48, 4, torch.float32, bias=True)
    magnitude = weight.norm(dim=1)
    y = ours(x, a, torch.zeros_like(b), magnitude, weight, bias, None, scale=2.0)
    torch.testing.assert_close(y, linear(x, weight, bias))


@pytest.mark.parametrize("frozen", [{}, {"bias": True}, {"norm": True}], ids=["", "bias", "norm"])
def test_gradcheck(frozen: dict[str, bool]) -> None:
    inputs, fixed = layer((5, 6), 7, 2, torch.float64, **frozen)
    x, a, b, magnitude = (each.double().requires_grad_() for each in inputs)

    def of_x_and_magnitude(x: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
        return ours(x, a, b, magnitude, *fixed, scale=0.5)

    def norm_is_constant(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # Divided by its norm and multiplied by it again: what is left has no detached part.
        norm = ops.norm(fixed[0], a.detach(), b.detach(), 0.5)
        return ours(x.detach(), a, b, norm, *fixed, scale=0.5)

    assert torch.autograd.gradcheck(of_x_and_magnitude, (x, magnitude))
    assert torch.autograd.gradcheck(norm_is_constant, (a, b))


def test_a_trained_bias_and_norm_get_gradients() -> None:
    inputs, (weight, bias, norm) = layer((5, 6), 7, 2, torch.float64, bias=True, norm=True)
    x, a, b, magnitude = (each.double() for each in inputs)
    bias, norm = bias.requires_grad_(), norm.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda bias, norm: ours(x, a, b, magnitude, weight, bias, norm, scale=0.5), (bias, norm)
    )


@pytest.mark.parametrize("bias", [False, True])
def test_a_quantised_weight_is_dequantised_once_each_way(bias: bool) -> None:
    inputs, (weight, own_bias, _) = layer((6, 24), 48, 4, torch.float32, bias=bias)
    dy = torch.randn(6, 48)
    wanted = with_grads(ours, inputs, (weight, own_bias, None), torch.float32, dy, scale=2.0)
    calls: list[torch.dtype] = []
    halved = Halved(weight / 2, calls)
    leaves = [each.detach().requires_grad_() for each in inputs]
    y = ours(*leaves, halved, own_bias, None, scale=2.0)
    assert calls == [torch.float32]
    y.backward(dy)
    assert calls == [torch.float32] * 2
    for got, expected in zip([y, *(leaf.grad for leaf in leaves)], wanted, strict=True):
        assert torch.equal(got, expected)


@both_backends
def test_dropout_is_equal_in_expectation_and_its_gradient_sees_its_mask(backend: str) -> None:
    torch.manual_seed(0)
    (_, a, b, magnitude), (weight, _, _) = layer((1, 8), 12, 2, torch.float32)
    one = torch.randn(1, 8)
    x = one.expand(4096, 8).contiguous().requires_grad_()
    with on(backend):
        y = ours(x, a, b, magnitude, weight, None, None, scale=2.0, dropout=0.5)
        upstream = torch.randn(12)
        (dx,) = torch.autograd.grad(y, x, upstream.expand(4096, 12))
    still = ours(one, a, b, magnitude, weight, None, None, scale=2.0)
    spread = y.detach().std(0) / 4096**0.5
    assert spread.min() > 0
    assert ((y.detach().mean(0) - still[0]).abs() < 5 * spread).all()
    # y is linear in each row of x once the mask is drawn.
    gain = magnitude / ops.norm(weight, a, b, 2.0)
    torch.testing.assert_close((dx * x).sum(1), y.detach() @ upstream, rtol=1e-3, atol=1e-3)
    base = (upstream * gain) @ weight
    assert len(torch.unique((dx - base).abs() < 1e-6)) == 2


def test_dropout_is_drawn_from_the_generator() -> None:
    (x, a, b, magnitude), (weight, _, _) = layer((6, 24), 48, 4, torch.float32)

    def drawn() -> torch.Tensor:
        return ours(x, a, b, magnitude, weight, None, None, scale=2.0, dropout=0.5)

    torch.manual_seed(1)
    first, second = drawn(), drawn()
    torch.manual_seed(1)
    assert torch.equal(drawn(), first)
    assert not torch.equal(first, second)


def test_without_bias_nothing_but_the_input_the_output_and_p_is_kept() -> None:
    inputs, fixed = layer((64, 24), 48, 4, torch.float32)
    x, a, b, magnitude = (each.requires_grad_() for each in inputs)
    kept: dict[int, int] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        if saved.shape[:1] == (64,):
            kept[saved.untyped_storage().data_ptr()] = saved.numel()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = ours(x, a, b, magnitude, *fixed, scale=2.0)
    assert kept.pop(y.untyped_storage().data_ptr()) == 64 * 48
    assert sorted(kept.values()) == [64 * 4, 64 * 24]


def test_an_output_that_is_changed_in_place_is_an_error() -> None:
    inputs, fixed = layer((6, 24), 48, 4, torch.float32)
    y = ours(*(each.requires_grad_() for each in inputs), *fixed, scale=2.0)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [False, True])
def test_autocast_computes_as_a_linear_would(norm: bool, dtype: torch.dtype) -> None:
    inputs, fixed = layer((16, 24), 48, 4, torch.float32, norm=norm)
    dy = torch.randn(16, 48)
    exact = with_grads(plain_dora, inputs, fixed, torch.float64, dy, scale=2.0)
    with torch.autocast("cpu", dtype):
        theirs = with_grads(plain_dora, inputs, fixed, torch.float32, dy, scale=2.0)
        mine = with_grads(ours, inputs, fixed, torch.float32, dy, scale=2.0)
    assert mine[0].dtype == dtype
    for got, wanted, other in zip(mine[1:], exact[1:], theirs[1:], strict=True):
        assert_near(got, wanted, other)


@pytest.mark.parametrize("frozen", [{}, {"bias": True}, {"norm": True}], ids=["", "bias", "norm"])
def test_compiles_in_one_graph(frozen: dict[str, bool]) -> None:
    inputs, fixed = layer((6, 24), 48, 4, torch.float32, **frozen)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got = with_grads(compiled, inputs, fixed, torch.float32, torch.tensor(0.5), scale=2.0)
    wanted = with_grads(ours, inputs, fixed, torch.float32, torch.tensor(0.5), scale=2.0)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_what_does_not_fit_is_named() -> None:
    inputs, (weight, _, _) = layer((6, 24), 48, 4, torch.float32)
    x, a, b, magnitude = inputs
    for changed, message in (
        ({"magnitude": magnitude[1:]}, r"shape of magnitude is \[47\], wanted \[48\]"),
        ({"x": x[:, 1:]}, r"shape of linear.weight is \[48, 24\], wanted \[any, 23\]"),
        ({"a": a[:, 1:]}, r"shape of linear.adapters\[0\].a is \[4, 23\]"),
        ({"b": b[1:]}, r"shape of linear.adapters\[0\].b is \[47, 4\], wanted \[48, 4\]"),
        ({"bias": torch.zeros(47)}, r"shape of linear.bias is \[47\], wanted \[48\]"),
        ({"weight": weight.clone().requires_grad_()}, r"linear\.weight is a trained weight"),
        ({"x": x.long()}, r"dtype of x is torch\.int64"),
    ):
        arguments = {"x": x, "a": a, "b": b, "magnitude": magnitude, "weight": weight, "bias": None}
        with pytest.raises(KernelArgumentError, match="dora_linear: " + message):
            ours(**{**arguments, **changed}, norm_weight=None, scale=2.0)
    with pytest.raises(KernelArgumentError, match="number of adapters is 0, wanted 1"):
        dora_linear(x, Linear(weight, None), magnitude)
