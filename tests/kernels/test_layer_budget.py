"""What one patched LoRA layer of Llama 3 8B keeps, launches and moves; counted without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dtune_kernels.catalog import CATALOG
from dtune_kernels.launch import recorded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from dtune.models.spec import describe
from dtune.patch.apply import apply_patches
from dtune.patch.base import patch_names
from dtune.peft.schema.lora import LoraConfig

HIDDEN, FFN, HEADS, KV_HEADS, RANK = 4096, 14336, 32, 8, 16
TOKENS = 256
LONG = 8192
"""Tokens for the traffic: the adapters' own bytes are shared by a realistic micro batch."""


def layer_of(device: str, *, patched: bool) -> nn.Module:
    """One decoder layer in bf16, LoRA on every linear with fp32 masters."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=torch.bfloat16
        )
    spec = describe(model, "llama")
    LoraConfig(rank=RANK).build().inject(model, spec)
    if patched:
        apply_patches(model, patch_names(), spec)
    layer: nn.Module = model.model.layers[0]
    if device == "cpu":
        layer = layer.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(0.01)
    return layer.train()


def run_layer(layer: nn.Module, tokens: int, device: str) -> Callable[[], None]:
    """Forward now, under autocast where the device has it; the backward when it is called."""
    dtype = torch.bfloat16
    x = torch.randn(1, tokens, HIDDEN, dtype=dtype, device=device, requires_grad=True)
    tables = [torch.randn(1, tokens, HIDDEN // HEADS, dtype=dtype, device=device) for _ in "cs"]
    with torch.autocast("cpu", dtype=dtype, enabled=device == "cpu"):
        y = layer(x, position_embeddings=tuple(tables))
    return lambda: y.backward(torch.randn_like(y))


def saved_bytes(layer: nn.Module) -> float:
    """Bytes a token kept for the backward: storages once, parameters and tables not."""
    kept: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run_layer(layer, TOKENS, "cpu")
    for parameter in layer.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    table = TOKENS * HIDDEN // HEADS * 2
    return sum(size for size in kept.values() if size != table) / TOKENS


class _Calls(TorchDispatchMode):
    """Notes the ops that a GPU would run a kernel for: no views, no bare allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if not (func.is_view or name.startswith("aten::empty") or name in FREE):
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


FREE = (
    "aten::detach",
    "aten::_unsafe_view",
    "aten::new_empty",
    "aten::empty_like",
    "aten::_reshape_alias",
    "aten::alias",
    "aten::promote_types",
)


def calls_of(layer: nn.Module, tokens: int, device: str) -> list[tuple[Any, tuple[Any, ...]]]:
    """Kernel-like ops of a forward and a backward; not those that make the inputs."""
    layer.zero_grad()  # adding to a gradient would be an op more for each adapter
    with _Calls() as counted:
        backward = run_layer(layer, tokens, device)
        backward()
    return [call for call in counted.calls if "randn" not in call[0]._schema.name]


def elements(name: str, args: tuple[Any, ...]) -> float:
    """Elements of two bytes that a catalogued call moves."""
    cost = CATALOG[name].cost(*args)
    return (cost.read + cost.written) / 2


def adapter_traffic(layer: nn.Module) -> float:
    """Elements a token that the adapters move, beyond what the layer moves without them.

    The fused activation counts what it moves more than the plain one; adding to the gradient of a
    group's input counts, as in the numbers of other implementations.
    """
    total = 0.0
    for func, args in calls_of(layer, LONG, "meta"):
        name = func._schema.name.removeprefix("dtune::")
        if name.startswith("lora_"):
            total += elements(name, args)
        if name == "lora_glu":
            gate, up = args[0], args[1]
            total -= 3 * gate.numel()
            assert up.shape == gate.shape
        if name == "lora_glu_backward":
            total -= 6 * args[0].numel()
        if name in ("aten::addmm", "aten::addmm_") and args[0].shape == (LONG, HIDDEN):
            total += args[0].numel()
    return total / LONG


@pytest.fixture(scope="module")
def patched() -> nn.Module:
    return layer_of("cpu", patched=True)


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    return layer_of("cpu", patched=False)


@pytest.mark.slow
def test_at_most_100_kb_a_token_are_kept(patched: nn.Module, plain: nn.Module) -> None:
    assert saved_bytes(patched) <= 100_000
    assert saved_bytes(plain) > 150_000


@pytest.mark.slow
def test_at_most_60_ops_run_forward_and_backward(patched: nn.Module, plain: nn.Module) -> None:
    calls = calls_of(patched, TOKENS, "cpu")
    assert len(calls) <= 60, "\n".join(func._schema.name for func, _ in calls)
    assert len(calls_of(plain, TOKENS, "cpu")) > 120


def kernels_of(func: Any, args: tuple[Any, ...]) -> int:
    """Kernels that a GPU runs for a call: launches of ours, with what is done about them."""
    name = func._schema.name
    if not name.startswith("dtune::"):
        return 1
    with recorded() as launches, _Calls() as around:
        CATALOG[name.removeprefix("dtune::")].triton(*args)
    return len(launches) + len(around.calls)


@pytest.mark.slow
def test_at_most_60_kernels_run_on_a_gpu(patched: nn.Module) -> None:
    """Ops that are several launches, and the sums of what their programs leave, counted."""
    calls = calls_of(patched, TOKENS, "cpu")
    kernels = [kernels_of(func, args) for func, args in calls]
    assert sum(kernels) > len(calls), "an op of several launches counts as one"
    assert sum(kernels) <= 60, [
        (func._schema.name, n) for (func, _), n in zip(calls, kernels, strict=True)
    ]


def test_adapters_move_at_most_200_000_elements_a_token() -> None:
    layer = layer_of("meta", patched=True)
    traffic = adapter_traffic(layer)
    assert 96_000 <= traffic <= 200_000, traffic
