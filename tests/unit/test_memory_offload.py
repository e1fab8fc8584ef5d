"""Activations in host memory: nothing is computed otherwise, and the device holds less."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from dtune.errors import ConfigError
from dtune.measure.storages import StorageTally, distinct_bytes
from dtune.objectives.causal import causal_loss
from dtune.parallel import offload, selective
from dtune.parallel.offload import Offload, Stash
from dtune.parallel.saved import parameters_by_name
from dtune.parallel.wrap import blocks_of, wrap_blocks
from dtune.runtime.schema import Recompute
from dtune.runtime.world import World
from tests.distributed.training import Setup, build_engine, config_folder, curve, make_batch

RECOMPUTE = [one.value for one in Recompute if one is not Recompute.auto]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = config_folder(tmp_path_factory.mktemp("llama"), blocks=4)
    return Setup(str(folder), steps=3, packed=True, random_weights=True)


@pytest.fixture
def _dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of a small model are dear enough to be kept by recompute=selective."""
    monkeypatch.setattr(selective, "DEAR", 48)


@pytest.mark.usefixtures("_dear")
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("peft", ["full", "lora"])
def test_losses_and_gradients_are_the_same_bits(
    world: World, setup: Setup, peft: str, precision: str, recompute: str
) -> None:
    chosen = replace(setup, peft=peft, precision=precision, recompute=recompute)
    assert curve(world, setup=replace(chosen, offload=True)) == curve(world, setup=chosen)


class Slots:
    """The storages that have left the device, as the hooks made them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hosts: list[torch.Tensor] = []
        send = Stash._send

        def noted(stash: Stash, tensor: torch.Tensor) -> Any:
            slot = send(stash, tensor)
            if slot.host is not None:
                self.hosts.append(slot.host)
            return slot

        monkeypatch.setattr(Stash, "_send", noted)


def kept_by_forward(
    world: World, setup: Setup, slots: Slots | None = None
) -> tuple[int, int, torch.Tensor]:
    """Bytes alive after a forward pass: on the device, and in host memory; with the loss."""
    engine = build_engine(world, setup)
    batch = make_batch(0, 0, packed=True)
    model = engine.module
    tally = StorageTally()
    with tally, engine.micro(last=True):
        loss = causal_loss(engine.model, batch).total
        gc.collect()
        inputs = [batch.input_ids, batch.labels, batch.position_ids, batch.document_ids]
        everything = tally.alive(besides=[*model.parameters(), *model.buffers(), *inputs])
    hosts = [] if slots is None else slots.hosts
    return everything - distinct_bytes(hosts), distinct_bytes(hosts), loss


@pytest.mark.usefixtures("_dear")
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("peft", ["full", "lora"])
def test_what_the_device_no_longer_holds_is_in_host_memory(
    world: World, setup: Setup, monkeypatch: pytest.MonkeyPatch, peft: str, recompute: str
) -> None:
    chosen = replace(setup, peft=peft, recompute=recompute)
    without, nothing, _ = kept_by_forward(world, chosen)
    assert nothing == 0
    slots = Slots(monkeypatch)
    device, host, loss = kept_by_forward(world, replace(chosen, offload=True), slots)
    assert device + host == without
    # Three of four blocks leave; a block's input is all that full recomputation keeps of it.
    hidden = 2 * 24 * 64 * 4
    assert host == 3 * hidden if recompute == "full" else host > 6 * hidden
    if recompute == "none":
        assert device < 0.5 * without
    del loss
    gc.collect()
    slots.hosts.clear()


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_nothing_is_left_after_backward(
    world: World, setup: Setup, monkeypatch: pytest.MonkeyPatch, recompute: str
) -> None:
    """No cycle between a node and what it saved keeps memory, here or there."""
    engine = build_engine(world, replace(setup, recompute=recompute, offload=True))
    gc.collect()
    gc.disable()
    try:
        tally = StorageTally()
        with tally, engine.micro(last=True):
            engine.backward(causal_loss(engine.model, make_batch(0, 0, packed=True)).total)
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        assert tally.alive(besides=[*gradients, *engine.module.parameters()]) == 0
    finally:
        gc.enable()


class Block(nn.Module):
    """Saves its input through a product, and what it multiplies with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64, dtype=torch.float64) / 8)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y = (x @ self.weight.t()).sin()
        first, second = y.chunk(2, dim=-1)
        return torch.cat([first * second, first], dim=-1) * scale + x


def run_blocks(
    blocks: list[Block], x: torch.Tensor, scale: torch.Tensor, offloader: Offload | None
) -> torch.Tensor:
    for index, block in enumerate(blocks):
        forward = partial(block.forward, scale=scale)
        if offloader is None:
            x = forward(x)
        else:
            x = offloader.run(index, lambda f, *a, hooks: f(*a), forward, x)
    return x.square().sum()


@pytest.fixture
def blocks() -> list[Block]:
    torch.manual_seed(0)
    return [Block() for _ in range(4)]


def test_graphs_may_be_run_out_of_order_and_twice(blocks: list[Block]) -> None:
    """Two forward passes before a backward, the older first, and one that is kept for a second."""
    parameters = [block.weight for block in blocks]
    inputs = [torch.randn(32, 64, dtype=torch.float64) for _ in range(2)]
    scale = torch.rand(32, 64, dtype=torch.float64)
    expected = [torch.autograd.grad(run_blocks(blocks, x, scale, None), parameters) for x in inputs]
    offloader = Offload(len(blocks))
    losses = [run_blocks(blocks, x, scale, offloader) for x in inputs]
    assert offloader.host_bytes > 0
    found = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    again = torch.autograd.grad(losses[0], parameters)
    for one, other in [*zip(found, expected, strict=True), (again, expected[0])]:
        assert all(map(torch.equal, one, other))


def test_a_shared_tensor_and_parameters_do_not_leave(blocks: list[Block]) -> None:
    offloader = Offload(len(blocks))
    scale = torch.rand(32, 64, dtype=torch.float64)
    loss = run_blocks(blocks, torch.randn(32, 64, dtype=torch.float64), scale, offloader)
    one = 32 * 64 * 8
    # Of each of three blocks: its input, what sin() took, and its result, halved, for the product;
    # and the result that scale is multiplied with needs no saving, for scale is not trained.
    assert offloader.host_bytes == 3 * 3 * one
    loss.backward()


def test_a_change_in_place_is_an_error_as_without(blocks: list[Block]) -> None:
    offloader = Offload(2)
    x = torch.randn(32, 64, dtype=torch.float64, requires_grad=True) * 1.0

    def spoil(f: Any, *a: torch.Tensor, hooks: Any) -> torch.Tensor:
        y: torch.Tensor = f(*a)
        a[0].data.add_(1)  # not seen by autograd
        a[0].add_(1)
        return y

    scale = torch.rand(32, 64, dtype=torch.float64)
    y = offloader.run(0, spoil, partial(blocks[0].forward, scale=scale), x)
    with pytest.raises(RuntimeError, match="modified in place after it had been saved"):
        offloader.run(1, spoil, partial(blocks[1].forward, scale=scale), y)


def test_small_storages_stay(blocks: list[Block]) -> None:
    offloader = Offload(len(blocks))
    scale = torch.rand(1, 64, dtype=torch.float64)
    loss = run_blocks(blocks, torch.randn(1, 64, dtype=torch.float64), scale, offloader)
    assert offloader.host_bytes == 0 < 64 * 8 < offload.MIN_BYTES
    loss.backward()


def test_a_saved_view_of_a_parameter_follows_the_parameter() -> None:
    """As under ZeRO-3: what a parameter holds is freed after forward and gathered elsewhere."""
    weight = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))
    values = weight.detach().clone()
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    with parameters_by_name():
        y = torch.nn.functional.linear(x, weight).sin().sum()
    expected = (x.detach() @ values.t()).cos() @ values
    weight.data = torch.empty(0, dtype=torch.float64)
    weight.data = torch.cat([torch.zeros(3, dtype=torch.float64), values.flatten()])[3:].view(8, 8)
    y.backward()
    assert torch.equal(x.grad, expected)


def test_compiled_blocks_are_refused(world: World, setup: Setup) -> None:
    with pytest.raises(ConfigError, match=r"train\.offload_activations=true.*train\.compile=false"):
        build_engine(world, replace(setup, offload=True, compile_blocks=True))


def test_a_model_that_cannot_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    spec: Any = _Spec((nn.Linear,))
    assert blocks_of(model, spec)
    with pytest.raises(ConfigError, match=r"Linear.*train\.offload_activations=false"):
        wrap_blocks(model, spec, recompute=Recompute.none, compile_blocks=False, offload=True)


class _Spec:
    def __init__(self, block_types: tuple[type[nn.Module], ...]) -> None:
        self.block_types = block_types
