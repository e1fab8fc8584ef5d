"""LoRA functions among the rest: compiled, checkpointed, used twice, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from dtune_kernels.catalog import CATALOG
from dtune_kernels.fourbit import nf4_quantize
from dtune_kernels.int8 import int8_quantize
from dtune_kernels.launch import recorded
from dtune_kernels.lora import Adapter, Linear, Norm, lora_linear, lora_linears, lora_mlp
from dtune_kernels.weights import QuantizedWeight
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tests.kernels.lora_cases import EPS, HalfWeight

Grads = list[torch.Tensor]
DIM, FFN = 24, 40
KINDS: dict[str, Callable[[torch.Tensor], QuantizedWeight | None]] = {
    "dense": lambda weight: None,
    "two halves": HalfWeight.of,
    "int8": int8_quantize,
    "nf4": partial(nf4_quantize, double_quant=True),
}


class Adapted(nn.Module):
    """A frozen linear, perhaps kept as bytes, and its adapter."""

    def __init__(self, outputs: int, inputs: int, rank: int, dropout: float, kind: str) -> None:
        super().__init__()
        weight = torch.randn(outputs, inputs) / inputs**0.5
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(outputs))
        self.a = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.b = nn.Parameter(torch.randn(outputs, rank) / rank**0.5)
        self.dropout = dropout
        self.quantized = KINDS[kind](weight)

    def linear(self) -> Linear:
        weight = self.weight if self.quantized is None else self.quantized
        return Linear(weight, self.bias, (Adapter(self.a, self.b, 2.0, self.dropout),))


class Block(nn.Module):
    """Something with all three functions; each result is read more than once."""

    def __init__(self, dropout: float = 0.0, *, kind: str = "dense") -> None:
        super().__init__()
        sizes = [(DIM, DIM)] * 4 + [(FFN, DIM)] * 2 + [(DIM, FFN)]
        self.linears = nn.ModuleList(
            Adapted(*size, 2 + index, dropout, kind) for index, size in enumerate(sizes)
        )
        self.norms = nn.ParameterList(torch.rand(DIM) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v, o, gate, up, down = (one.linear() for one in self.linears)
        norms = [Norm(weight, EPS, False) for weight in self.norms]
        a, b, c = lora_linears(x, (q, k, v), norm=norms[0])
        x = x + lora_linear(a * b.sigmoid() + c, o)
        return x + lora_mlp(x, gate, up, down, activation="silu", norm=norms[1])


def grads(block: Block, call: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, Grads]:
    torch.manual_seed(1)
    x = torch.randn(3, 5, DIM, requires_grad=True)
    torch.manual_seed(2)
    y = call(x)
    found = torch.autograd.grad(y.square().sum(), [x, *trained(block)])
    return y.detach(), list(found)


def trained(block: Block) -> list[nn.Parameter]:
    return [each for each in block.parameters() if each.requires_grad]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiles_without_graph_breaks(dropout: float, kind: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    block = Block(dropout, kind=kind)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    y, eager = grads(block, block)
    other, got = grads(block, compiled)
    torch.testing.assert_close(other, y)
    torch.testing.assert_close(got, eager)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputation_gives_the_same_gradients(dropout: float) -> None:
    torch.manual_seed(0)
    block = Block(dropout)
    y, expected = grads(block, block)
    again, got = grads(block, lambda x: checkpoint(block, x, use_reentrant=False))
    assert torch.equal(again, y)
    for mine, wanted in zip(got, expected, strict=True):
        assert torch.equal(mine, wanted)


def test_recomputation_that_keeps_products_gives_the_same_gradients() -> None:
    torch.manual_seed(0)
    block = Block(0.2)
    kept = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    _, expected = grads(block, block)
    _, got = grads(block, lambda x: checkpoint(block, x, use_reentrant=False, context_fn=kept))
    for mine, wanted in zip(got, expected, strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_graph_that_is_retained_gives_the_same_gradients_twice(dropout: float) -> None:
    torch.manual_seed(0)
    block = Block(dropout)
    x = torch.randn(3, 5, DIM, requires_grad=True)
    loss = block(x).square().sum()
    first = torch.autograd.grad(loss, [x, *trained(block)], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *trained(block)])
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_an_input_read_twice_is_not_written_to() -> None:
    torch.manual_seed(0)
    block = Block()
    x = torch.randn(3, 5, DIM, requires_grad=True)
    before, version = x.detach().clone(), x._version
    one = block.linears[0].linear()
    ys = [lora_linear(x, one), lora_linear(x, one)]
    upstream = torch.randn_like(ys[0])
    kept = upstream.clone()
    torch.autograd.backward(ys, [upstream, upstream])
    assert torch.equal(x, before)
    assert x._version == version
    assert torch.equal(upstream, kept)
    (single,) = torch.autograd.grad(lora_linear(x, one), x, upstream)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * single)


def test_a_weight_changed_before_the_backward_is_noticed() -> None:
    block = Block()
    one = block.linears[0].linear()
    y = lora_linear(torch.randn(5, DIM, requires_grad=True), one)
    with torch.no_grad():
        block.linears[0].a.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_refused() -> None:
    block = Block()
    x = torch.randn(5, DIM, requires_grad=True)
    y = lora_linear(x, block.linears[0].linear())
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


class Counted(TorchDispatchMode):
    """Runs ops of the catalog by their launchers, unlaunched, and notes what a GPU would do."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.elements = 0.0
        """Of two bytes, moved by LoRA ops; of gated units only what adapters add to it."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name.startswith("dtune::"):
            op = CATALOG[name.removeprefix("dtune::")]
            if op.name.startswith("lora_"):
                cost = op.cost(*args)
                self.elements += (cost.read + cost.written) / 2
                if op.name in GLU:
                    self.elements -= GLU[op.name] * args[0].numel()
            with recorded() as launches:
                result = op.triton(*args)
            self.launches += [each[0].__name__ for each in launches]
            return result
        if not func.is_view and "empty" not in name and "detach" not in name:
            self.launches.append(name)
        return func(*args, **(kwargs or {}))


GLU = {"lora_glu": 3, "lora_glu_backward": 6}
"""Matrices [T, F] that a gated unit without adapters reads and writes."""


def llama_8b_layer(dropout: float) -> Counted:
    """Forward and backward of all linears of a layer and the norms before them, on no device."""
    meta, dtype = torch.device("meta"), torch.bfloat16
    tokens, hidden, kv, ffn, rank = 8192, 4096, 1024, 14336, 16

    def linear(outputs: int, inputs: int) -> Linear:
        a = torch.empty(rank, inputs, device=meta, requires_grad=True)
        b = torch.empty(outputs, rank, device=meta, requires_grad=True)
        weight = torch.empty(outputs, inputs, dtype=dtype, device=meta)
        return Linear(weight, None, (Adapter(a, b, 2.0, dropout),))

    x = torch.empty(tokens, hidden, dtype=dtype, device=meta, requires_grad=True)
    norm = Norm(torch.empty(hidden, dtype=dtype, device=meta), EPS, False)
    with Counted() as counted:
        qkv = [linear(hidden, hidden), linear(kv, hidden), linear(kv, hidden)]
        q, k, v = lora_linears(x, qkv, norm=norm)
        o = lora_linear(q, linear(hidden, hidden))
        gate, up, down = linear(ffn, hidden), linear(ffn, hidden), linear(hidden, ffn)
        y = lora_mlp(o, gate, up, down, activation="silu", norm=norm)
        torch.autograd.backward([y, k, v], [torch.empty_like(each) for each in (y, k, v)])
    counted.elements /= tokens
    return counted


def test_a_layer_launches_each_kernel_once_a_group() -> None:
    counts = Counter(llama_8b_layer(0.0).launches)
    assert counts == {
        "_forward": 2,
        "_backward": 2,
        "aten::mm": 7 + 4,
        "aten::addmm_": 3,
        "_project": 4,
        "_expand": 3 + 3,
        "_glu": 1,
        "_glu_backward": 1,
        "_grad_a": 4,
        "_grad_b": 4,
        "_add_shares": 8,
    }
    # One seed a call.
    dropped = Counter(llama_8b_layer(0.1).launches)
    assert dropped["aten::randint"] == 3
    assert sum(dropped.values()) <= sum(counts.values()) + 3


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_adapters_move_little_in_a_layer(dropout: float) -> None:
    """Elements of two bytes a token; PEFT moves 664,000."""
    assert llama_8b_layer(dropout).elements <= 200_000
