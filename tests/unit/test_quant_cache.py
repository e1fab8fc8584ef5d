"""Weights that stay dequantised: the same numbers, from fewer dequantisations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.config.support import check_run
from dtune.errors import ConfigError
from dtune.patch.apply import apply_patches
from dtune.patch.base import patch_names
from dtune.quant.linear import QuantizedLinear
from dtune.quant.replace import GIB, ByteQuantizer, fourbit_quantizer
from dtune.quant.schema import QUANT, FourBitConfig
from dtune.quant.schema.nf4 import Nf4Config
from dtune.types import ModelSpec
from tests.unit.patched import adapted, train_step
from tests.unit.test_patch_quantized import to_bytes

LINEARS = 14
CPU = torch.device("cpu")


class Dequantisations(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += "dequantize" in func._schema.name
        return func(*args, **(kwargs or {}))


def quantised(*, patched: bool, peft: str) -> tuple[nn.Module, ModelSpec]:
    model, spec = adapted("llama", peft=peft, rank=4)
    assert to_bytes(model) == LINEARS
    if patched:
        apply_patches(model, patch_names(), spec)
    return model, spec


def quantizer(linears: float, *, dtype: torch.dtype = torch.float32) -> ByteQuantizer:
    """With room for so many of the largest weights."""
    model, _ = quantised(patched=False, peft="lora")
    sizes = [m.layout.numel for m in model.modules() if isinstance(m, QuantizedLinear)]
    room = linears * max(sizes) * dtype.itemsize
    return fourbit_quantizer(Nf4Config(cache_gib=room / GIB), CPU)


def kept(model: nn.Module) -> list[QuantizedLinear]:
    linears = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    return [linear for linear in linears if linear.floats is not None]


@pytest.mark.parametrize("peft", ["lora", "dora"])
@pytest.mark.parametrize("patched", [False, True], ids=["plain", "kernels"])
def test_a_step_is_the_same_bit_for_bit_with_fewer_dequantisations(
    patched: bool, peft: str
) -> None:
    model, _ = quantised(patched=patched, peft=peft)
    counts = {}
    steps = {}
    for linears in (0, 3, LINEARS):
        quantizer(linears).cache(model, torch.float32)
        counter = Dequantisations()
        with counter:
            steps[linears] = train_step(model)
        counts[len(kept(model))] = counter.count
    none, some, every = sorted(counts)
    assert (none, every) == (0, LINEARS)
    assert 3 <= some < LINEARS
    # Forward and backward, and for DoRA the lengths of rows; the first block needs no backward
    # of what only the embedding would see.
    assert counts[none] >= 2 * LINEARS - 3
    assert counts[none] > counts[some] > counts[every] == 0
    for linears in (3, LINEARS):
        assert torch.equal(steps[linears].loss, steps[0].loss)
        for name, gradient in steps[0].grads.items():
            assert torch.equal(steps[linears].grads[name], gradient), name


def test_another_dtype_than_the_one_that_is_kept_is_dequantised() -> None:
    model, _ = quantised(patched=False, peft="lora")
    quantizer(LINEARS).cache(model, torch.float32)
    linear = kept(model)[0]
    weight = linear.frozen_weight()
    assert weight.dequantize(torch.float32) is linear.floats
    half = weight.dequantize(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    linear.floats = None
    assert torch.equal(linear.frozen_weight().dequantize(torch.bfloat16), half)


def test_what_is_kept_is_neither_saved_nor_shared_nor_trained() -> None:
    model, _ = quantised(patched=False, peft="lora")
    names = list(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    quantizer(LINEARS).cache(model, torch.float32)
    assert len(kept(model)) == LINEARS
    assert list(model.state_dict()) == names
    assert [id(p) for p in model.parameters()] == parameters
    assert not any(linear.floats.requires_grad for linear in kept(model))


def test_a_linear_with_its_weight_kept_compiles_as_one_graph() -> None:
    model, _ = quantised(patched=False, peft="lora")
    linear = next(m for m in model.modules() if isinstance(m, QuantizedLinear))
    x = torch.randn(4, linear.in_features)
    plain = linear(x)
    linear.keep_floats(torch.float32)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), plain)


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "kernels"])
def test_compiled_blocks_compute_the_same_over_kept_weights(patched: bool) -> None:
    torch._dynamo.reset()
    steps = []
    for linears in (0, LINEARS):
        model, _ = quantised(patched=patched, peft="lora")
        quantizer(linears).cache(model, torch.float32)
        for layer in model.model.layers:
            layer.compile(fullgraph=True, backend="aot_eager")
        assert len(kept(model)) == linears
        steps.append(train_step(model))
    assert torch.equal(steps[0].loss, steps[1].loss)
    for name, gradient in steps[0].grads.items():
        assert torch.equal(steps[1].grads[name], gradient), name


def test_the_room_is_never_exceeded_and_small_weights_fill_it_up() -> None:
    model, _ = quantised(patched=False, peft="lora")
    sizes = [m.layout.numel * 4 for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert len(set(sizes)) > 1
    for room in (max(sizes), max(sizes) + min(sizes), sum(sizes) - 1, sum(sizes)):
        for linear in kept(model):
            linear.floats = None
        fourbit_quantizer(Nf4Config(cache_gib=room / GIB), CPU).cache(model, torch.float32)
        used = sum(linear.layout.numel * 4 for linear in kept(model))
        assert used <= room
        rest = [m for m in model.modules() if isinstance(m, QuantizedLinear) and m.floats is None]
        assert all(linear.layout.numel * 4 > room - used for linear in rest)
    assert len(kept(model)) == LINEARS


def test_a_cache_without_room_for_any_weight_is_refused() -> None:
    model, _ = quantised(patched=False, peft="lora")
    with pytest.raises(ConfigError, match=r"quant\.cache_gib=.* smallest takes .* GiB; raise it"):
        quantizer(0.001).cache(model, torch.float32)


@pytest.mark.parametrize("name", [n for n in QUANT.names() if n != "none"])
def test_a_cache_below_zero_is_refused(name: str) -> None:
    assert issubclass(QUANT.config("nf4"), FourBitConfig)
    with pytest.raises(ConfigError, match=r"quant\.cache_gib=-1 must be 0 or more"):
        QUANT.config(name)(cache_gib=-1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_engines_that_cut_the_base_are_refused(engine: str) -> None:
    chosen = ["quant=nf4", "peft=lora", "quant.cache_gib=1"]
    check_run(load_frozen(compose_overrides("train", [*chosen, "parallel=ddp"])), 2)
    with pytest.raises(ConfigError, match=rf"quant\.cache_gib=1 .*parallel={engine}.*cache_gib=0"):
        check_run(load_frozen(compose_overrides("train", [*chosen, f"parallel={engine}"])), 2)
