"""Optimizers and schedules."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dtune.errors import ConfigError
from dtune.optim.schedules import build_schedule, factor
from dtune.optim.schema import OPTIM, OptimConfig
from dtune.optim.schema.adamw import Adamw8bitConfig, AdamwConfig
from dtune.optim.schema.schedule import ScheduleConfig, Shape
from dtune.optim.schema.sgd import SgdConfig
from dtune.parallel.ranges import create_optimizer_state


def network() -> nn.Module:
    """A matrix, a bias and a norm, with a gradient of zero: only decay moves them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    for parameter in net.parameters():
        nn.init.normal_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    return net


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_only_an_optimizer_that_has_state_takes_a_step_to_make_it(momentum: float) -> None:
    net = network()
    before = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer = SgdConfig(lr=0.1, momentum=momentum).build(net.named_parameters())
    steps: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: steps.append(1))
    create_optimizer_state(optimizer)
    create_optimizer_state(optimizer)
    assert len(steps) == (momentum > 0)
    assert len(optimizer.state) == (len(before) if momentum else 0)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("config", [AdamwConfig(lr=0.1, weight_decay=0.5)])
def test_matrices_decay_and_norms_and_biases_do_not(config: OptimConfig) -> None:
    net = network()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    config.build(net.named_parameters()).step()
    for name, parameter in net.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if parameter.ndim > 1 else before[name]
        torch.testing.assert_close(parameter, expected)


def test_sgd_decays_matrices_alone_and_has_momentum() -> None:
    net = network()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = SgdConfig(lr=0.1, weight_decay=0.5, momentum=0.9).build(net.named_parameters())
    optimizer.step()
    for name, parameter in net.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (parameter.ndim > 1)
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_adamw_equals_its_definition() -> None:
    """Loshchilov & Hutter 2017, algorithm 2, in fp64."""
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.randn(4, 5, generator=generator, dtype=torch.float64))
    config = AdamwConfig(lr=0.01, weight_decay=0.1, beta1=0.8, beta2=0.95, eps=1e-6)
    optimizer = config.build([("weight", weight)])
    expected, m, v = weight.detach().clone(), 0.0, 0.0
    for step in range(1, 6):
        gradient = torch.randn(4, 5, generator=generator, dtype=torch.float64)
        weight.grad = gradient.clone()
        optimizer.step()
        m = 0.8 * m + 0.2 * gradient
        v = 0.95 * v + 0.05 * gradient**2
        update = (m / (1 - 0.8**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-6)
        expected = expected - 0.01 * (update + 0.1 * expected)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=0)
    assert not torch.allclose(weight.detach(), expected * 1.05, rtol=1e-12, atol=0)


def test_8bit_adamw_follows_adamw_with_an_eighth_of_its_state_bits() -> None:
    """8 bits keep two figures of a moment; Adam's steps stay close to those of full moments."""
    weights = []
    for kind in (AdamwConfig, Adamw8bitConfig):
        generator = torch.Generator().manual_seed(1)
        weight = nn.Parameter(torch.randn(64, 128, generator=generator))  # small ones stay fp32
        start = weight.detach().clone()
        optimizer = kind(lr=0.01).build([("weight", weight)])
        for _ in range(5):
            weight.grad = torch.randn(64, 128, generator=generator)
            optimizer.step()
            optimizer.zero_grad()
        weights.append(weight.detach() - start)
    exact, eight_bit = weights
    assert optimizer.state[weight]["state1"].dtype == torch.uint8
    assert 0 < (exact - eight_bit).norm() < 0.05 * exact.norm()


def test_every_optimizer_refuses_a_learning_rate_of_zero() -> None:
    for name in OPTIM.names():
        with pytest.raises(ConfigError, match=r"optim\.lr"):
            OPTIM.config(name)(lr=0.0)


def course(config: ScheduleConfig, steps: int) -> list[float]:
    """Learning rate of every step of a run, with a peak of 2."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = build_schedule(config, optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("shape", list(Shape))
def test_warm_up_rises_to_the_peak_and_never_stands_still(shape: Shape) -> None:
    rates = course(ScheduleConfig(name=shape, warmup_steps=4), 20)
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert max(rates) == 2.0


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("low", [0.0, 0.1])
def test_courses_end_at_the_least_factor(warmup: int, low: float) -> None:
    for shape in (Shape.linear, Shape.cosine):
        config = ScheduleConfig(name=shape, warmup_steps=warmup, min_factor=low)
        rates = course(config, 11 + warmup)
        assert rates[warmup] == 2.0
        assert rates[-1] == pytest.approx(2.0 * low, abs=1e-12)
        middle = 2.0 * (low + (1 - low) * 0.5)
        assert rates[warmup + 5] == pytest.approx(middle)
        assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_linear_and_cosine_differ_as_their_names_say() -> None:
    linear = factor(ScheduleConfig(name=Shape.linear), 9, 2)
    cosine = factor(ScheduleConfig(name=Shape.cosine), 9, 2)
    assert linear == pytest.approx(0.75)
    assert cosine == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_constant_stays() -> None:
    assert set(course(ScheduleConfig(name=Shape.constant), 5)) == {2.0}


def test_a_run_of_one_step_runs_at_the_peak() -> None:
    assert course(ScheduleConfig(name=Shape.cosine), 1) == [2.0]


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"schedule\.warmup_steps=5 .* 5 steps"):
        course(ScheduleConfig(warmup_steps=5), 5)
