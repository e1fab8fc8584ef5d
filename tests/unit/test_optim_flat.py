"""AdamW over one buffer: torch's updates, and parameters that are still tensors by name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.config.support import check_run
from dtune.errors import ConfigError
from dtune.optim import optimizers
from dtune.optim.flat import ALIGNMENT, FlatAdamW
from dtune.optim.schema import same_rate
from dtune.optim.schema.adamw import AdamwConfig, Flat
from tests.kernels.compare import assert_parity

STEPS = 20


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Matrices of odd sizes, biases, and a norm."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3)).to(dtype)


def twice_for_b(name: str) -> float:
    return 2.0 if name.startswith("2.") else 1.0


def gradients(net: nn.Module, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {n: torch.randn(p.shape, generator=generator) for n, p in net.named_parameters()}


def train(
    flat: Flat, dtype: torch.dtype, rate_factor: Callable[[str], float]
) -> tuple[dict[str, torch.Tensor], torch.optim.Optimizer]:
    net = network(dtype)
    config = AdamwConfig(lr=1e-2, weight_decay=0.1, flat=flat)
    optimizer = config.build(net.named_parameters(), rate_factor=rate_factor, whole=True)
    for step in range(STEPS):
        for name, gradient in gradients(net, step).items():
            # What no loss has reached has no gradient, in the third step.
            none = step == 2 and name == "1.bias" and flat is Flat.always
            zero = step == 2 and name == "1.bias"
            net.get_parameter(name).grad = (
                None if none else gradient.to(dtype) * (0.0 if zero else 1.0)
            )
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in net.parameters())
    return {n: p.detach() for n, p in net.named_parameters()}, optimizer


@pytest.mark.parametrize("rate_factor", [same_rate, twice_for_b])
def test_twenty_steps_are_those_of_torch(rate_factor: Callable[[str], float]) -> None:
    exact, _ = train(Flat.never, torch.float64, rate_factor)
    plain, theirs = train(Flat.never, torch.float32, rate_factor)
    found, ours = train(Flat.always, torch.float32, rate_factor)
    assert type(theirs) is torch.optim.AdamW
    assert type(ours) is FlatAdamW
    assert len(ours.param_groups) == len(theirs.param_groups)
    for name, values in found.items():
        assert_parity(values, exact[name], plain[name])


def flat_network() -> tuple[nn.Module, FlatAdamW]:
    net = network()
    optimizer = AdamwConfig(flat=Flat.always).build(net.named_parameters(), whole=True)
    assert isinstance(optimizer, FlatAdamW)
    return net, optimizer


def test_parameters_keep_their_values_and_lie_in_one_buffer() -> None:
    net, optimizer = flat_network()
    for (name, found), expected in zip(net.named_parameters(), network().parameters(), strict=True):
        assert torch.equal(found, expected), name
        assert found.is_leaf
        assert found.is_contiguous()
        assert found.storage_offset() % ALIGNMENT == 0
        assert optimizer.state[found]["exp_avg"].shape == found.shape
    assert len({p.untyped_storage().data_ptr() for p in net.parameters()}) == 1


def test_gathered_gradients_are_views_and_nothing_lies_between_them() -> None:
    net, optimizer = flat_network()
    given = gradients(net, 0)
    for name, gradient in given.items():
        # Of another layout, as that of a transposed product is.
        strided = gradient.t().contiguous().t() if gradient.dim() == 2 else gradient
        net.get_parameter(name).grad = strided
    buffer = optimizer.gather()
    assert optimizer.gather() is buffer
    total = sum(float(g.double().square().sum()) for g in given.values())
    assert float(buffer.double().square().sum()) == pytest.approx(total, rel=1e-12)
    buffer.mul_(2)
    for name, gradient in given.items():
        found = net.get_parameter(name).grad
        assert found is not None
        assert torch.equal(found, 2 * gradient)


def test_saved_tensors_notice_the_update() -> None:
    net, optimizer = flat_network()
    weight = net.get_parameter("0.weight")
    loss = (weight * weight).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("whole", [True, False, None])
def test_auto_keeps_torchs_own_on_a_cpu(whole: bool | None) -> None:
    optimizer = AdamwConfig().build(network().named_parameters(), whole=whole)
    assert type(optimizer) is torch.optim.AdamW


def test_auto_takes_few_whole_parameters_where_triton_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optimizers, "triton_problem", lambda device: "")
    kinds = {
        whole: type(AdamwConfig().build(network().named_parameters(), whole=whole))
        for whole in (True, False, None)
    }
    torchs = torch.optim.AdamW
    assert kinds == {True: FlatAdamW, False: torchs, None: torchs}
    size = sum(p.nbytes for p in network().parameters())
    for limit, kind in ((size, FlatAdamW), (size - 1, torchs)):
        monkeypatch.setattr(optimizers, "FLAT_BYTES", limit)
        assert type(AdamwConfig().build(network().named_parameters(), whole=True)) is kind


@pytest.mark.parametrize("engine", ["fsdp", "zero1", "zero2", "zero3"])
def test_engines_that_cut_are_refused_before_anything_is_loaded(engine: str) -> None:
    chosen = ["optim.flat=always", "peft=lora"]
    check_run(load_frozen(compose_overrides("train", [*chosen, "parallel=ddp"])), 2)
    with pytest.raises(ConfigError, match=rf"optim\.flat=always with parallel={engine}.*use optim"):
        check_run(load_frozen(compose_overrides("train", [*chosen, f"parallel={engine}"])), 2)
