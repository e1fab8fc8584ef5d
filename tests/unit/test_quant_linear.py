"""Linears of bytes compute what a linear with the dequantised weight computes."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dtune.quant.layout import FourBitLayout, Int8Layout, Layout
from dtune.quant.linear import QuantizedLinear
from dtune.types import LinearLike, QuantizedLinearLike
from tests.contracts.small_models import read_whole
from tests.unit.test_quant_source import source_of

CPU = torch.device("cpu")
SHAPE = (24, 40)
LAYOUTS: dict[str, Layout] = {
    "nf4 double": FourBitLayout(SHAPE, "nf4", 64, double=True),
    "nf4": FourBitLayout(SHAPE, "nf4", 64, double=False),
    "fp4 double": FourBitLayout(SHAPE, "fp4", 32, double=True),
    "int8": Int8Layout(SHAPE),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def pair(layout: Layout, *, bias: bool = True) -> tuple[QuantizedLinear, nn.Linear]:
    """A linear of bytes, and a plain one with the weight that it stands for."""
    torch.manual_seed(0)
    plain = nn.Linear(SHAPE[1], SHAPE[0], bias=bias)
    kept = QuantizedLinear(layout, plain.bias, CPU)
    source = source_of(plain.weight.detach(), layout)
    for part in layout.sizes:
        kept.get_parameter(part).data.copy_(read_whole(source, f"x.{part}"))
    plain.weight = nn.Parameter(read_whole(source, "x.weight"), requires_grad=False)
    return kept, plain


def results(linear: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, and gradients of input and bias."""
    x = x.clone().requires_grad_()
    y = linear(x)
    (y.float() * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
    assert x.grad is not None
    found = [y.detach(), x.grad]
    bias = dict(linear.named_parameters()).get("bias")
    if bias is not None and bias.grad is not None:
        found.append(bias.grad)
        bias.grad = None
    return found


@each_layout
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_a_linear_over_the_dequantised_weight(
    layout: Layout, autocast: bool, bias: bool
) -> None:
    kept, plain = pair(layout, bias=bias)
    x = torch.randn(2, 5, SHAPE[1])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, wanted = results(kept, x), results(plain, x)
    assert len(ours) == 2 + bias
    for one, other in zip(ours, wanted, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@each_layout
def test_bytes_are_all_it_has_and_none_is_trained(layout: Layout) -> None:
    kept, _ = pair(layout)
    assert isinstance(kept, LinearLike)
    assert isinstance(kept, QuantizedLinearLike)
    for name, parameter in kept.named_parameters():
        if name != "bias":
            assert parameter.dtype == torch.uint8
            assert not parameter.requires_grad
            assert parameter.ndim == 1
    assert list(dict(kept.named_parameters())) == [*layout.sizes, "bias"]
    assert kept.frozen_weight().shape == SHAPE
    own = [kept.get_parameter(part) for part in layout.sizes]
    assert all(a is b for a, b in zip(kept.frozen_weight().tensors(), own, strict=True))


@each_layout
def test_no_float_weight_is_kept_for_the_backward(layout: Layout) -> None:
    kept, _ = pair(layout)
    kept.bias.requires_grad_(False)
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = kept(torch.randn(3, SHAPE[1], requires_grad=True))
    assert saved
    assert {tensor.dtype for tensor in saved} == {torch.uint8}
    weight = SHAPE[0] * SHAPE[1]
    gc.collect()
    floats = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.numel() == weight]
    assert not [x for x in floats if x.is_floating_point() and x.grad_fn is not None]
    assert y.requires_grad


@each_layout
def test_backward_reads_the_bytes_where_they_then_are(layout: Layout) -> None:
    """Engines free the gathered bytes after the forward and gather them elsewhere."""
    kept, plain = pair(layout)
    x = torch.randn(3, SHAPE[1], requires_grad=True)
    y = kept(x)
    for part in layout.sizes:
        parameter = kept.get_parameter(part)
        elsewhere = torch.empty(len(parameter) + 3, dtype=torch.uint8)[3:]
        elsewhere.copy_(parameter)
        old, parameter.data = parameter.data, elsewhere
        old.fill_(255)
        assert parameter.storage_offset() == 3, "no address of an fp32"
    y.sum().backward()
    wanted = torch.ones(3, SHAPE[0]) @ plain.weight
    assert x.grad is not None
    assert torch.equal(x.grad, wanted)
    assert torch.equal(kept(x), F.linear(x, plain.weight, plain.bias))


@each_layout
def test_compiles_as_one_graph(layout: Layout) -> None:
    kept, plain = pair(layout)
    compiled = torch.compile(kept, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, SHAPE[1])
    for one, other in zip(results(compiled, x), results(plain, x), strict=False):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-6)


def test_gradients_of_a_trained_bias_alone() -> None:
    kept, plain = pair(LAYOUTS["nf4"])
    x = torch.randn(4, SHAPE[1])
    kept(x).sum().backward()
    assert plain.bias is kept.bias
    assert torch.equal(kept.bias.grad, torch.full((SHAPE[0],), 4.0))
