"""Tokens per second of training alone, by a clock that the test turns."""

from __future__ import annotations

import time

import pytest

from dtune.measure.memory import peak_memory_gib
from dtune.measure.throughput import Meter


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_first_steps_evaluation_and_saving_are_kept_apart(clock: Clock) -> None:
    meter = Meter(untimed_steps=2)
    clock.now += 50.0  # assembling a run is no training
    meter.start()
    for seconds in (8.0, 4.0):  # warm-up
        clock.now += seconds
        assert meter.lap(steps=1, tokens=100, targets=30) == seconds
    clock.now += 0.5
    with meter.apart("evaluate"):
        clock.now += 30.0
    with meter.apart("save"):
        clock.now += 7.0
    clock.now += 1.5
    assert meter.lap(steps=1, tokens=100, targets=30) == 2.0
    clock.now += 2.0
    with meter.apart("evaluate"):
        clock.now += 10.0
    assert meter.lap(steps=2, tokens=300, targets=70) == 2.0
    assert meter.excluded == {"warm-up": 12.0, "evaluate": 40.0, "save": 7.0}
    assert (meter.seconds, meter.steps) == (4.0, 5)
    assert meter.tokens_per_second == 400 / 4.0
    assert meter.targets_per_second == 100 / 4.0


def test_what_fails_apart_is_kept_apart(clock: Clock) -> None:
    meter = Meter(untimed_steps=0)
    meter.start()

    def save() -> None:
        with meter.apart("save"):
            clock.now += 3.0
            raise KeyError

    with pytest.raises(KeyError):
        save()
    clock.now += 1.0
    assert meter.lap(steps=1, tokens=10, targets=1) == 1.0
    assert meter.excluded == {"save": 3.0}


def test_before_the_first_timed_step_there_is_no_rate(clock: Clock) -> None:
    meter = Meter(untimed_steps=1)
    meter.start()
    clock.now += 1.0
    meter.lap(steps=1, tokens=10, targets=1)
    assert (meter.tokens_per_second, meter.targets_per_second) == (0.0, 0.0)


def test_peak_memory_is_the_process_s_on_the_cpu() -> None:
    import torch

    before = peak_memory_gib(torch.device("cpu"))
    held = bytearray(256 * 1024**2)
    held[::4096] = b"x" * len(held[::4096])
    after = peak_memory_gib(torch.device("cpu"))
    assert 0.01 < before <= after < 1000
    assert after >= 0.25
