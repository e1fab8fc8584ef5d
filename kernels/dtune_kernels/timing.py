"""How long calls take on a device, and what the device can do at best."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]

COLD_BYTES = 512 << 20
"""More than a GPU's caches hold: 50 MB on an H200, 126 MB on a B200, 256 MB on an MI300X."""
MAX_COPIES = 64
MIN_ROUNDS, MAX_ROUNDS = 5, 100
_CYCLES = 2.0e9
"""A second in cycles, at most, of the GPUs that Triton runs on."""
_LONGEST_WAIT = 5e-3
"""Seconds. A call whose launches take the host longer is timed with its host's time."""


@dataclass(frozen=True)
class Timing:
    """Seconds of a call."""

    median: float
    low: float
    """10th percentile."""
    high: float
    """90th percentile."""
    samples: int


@dataclass(frozen=True)
class Ceilings:
    """What was measured on the device for the two things that bound a kernel."""

    bandwidth: float
    """Bytes a second, read and written, of a copy."""
    flops: float
    """Floating-point operations a second of a GEMM."""

    def seconds(self, nbytes: int, flops: int) -> float:
        """Return what a call that moves and computes so much takes at least."""
        return max(nbytes / self.bandwidth, flops / self.flops)


def num_copies(nbytes: int) -> int:
    """Copies of operands of so many bytes that, used in turn, are in no cache any more."""
    return min(max(math.ceil(COLD_BYTES / max(nbytes, 1)), 1), MAX_COPIES)


def measure(
    alternatives: Mapping[str, Sequence[Call]],
    device: torch.device,
    *,
    seconds: float = 0.2,
    rounds: int | None = None,
) -> dict[str, Timing]:
    """Time alternatives in turn, A B A B ..., so that a clock that drifts drifts for all.

    On a GPU each call is put between two events, behind a pause that lasts until the host has
    launched all of it: what is timed is the device. On a CPU it is the wall clock.

    Args:
        alternatives: Of each name the same call with different operands, which are used in turn
            (see ``num_copies``); their results stay alive as long, so that they are cold too.
        device: Where the calls run.
        seconds: Time that all samples together may take, about.
        rounds: Samples of each alternative; None for as many as the time allows, 5 to 100.
    """
    clock = _EventClock() if device.type == "cuda" else _WallClock()
    expected = 0.0
    for name, calls in alternatives.items():
        expected += clock.warm_up(name, calls)
    count = rounds or min(max(int(seconds / max(expected, 1e-9)), MIN_ROUNDS), MAX_ROUNDS)
    kept = {name: deque[object](maxlen=len(calls)) for name, calls in alternatives.items()}
    for name, calls in alternatives.items():
        # So many results are alive at a time: memory for them is allocated here, not in samples.
        kept[name].extend(call() for call in calls)
    for i in range(count):
        for name, calls in alternatives.items():
            kept[name].append(clock.sample(name, calls[i % len(calls)]))
    return {name: _timing(samples) for name, samples in clock.samples().items()}


def measure_ceilings(
    device: torch.device, dtype: torch.dtype, *, rounds: int | None = None
) -> Ceilings:
    """Time a copy of 1 GiB and a GEMM of 8192 x 8192 x 8192 of random numbers in the dtype.

    On a CPU, where it is of use to tests only, 4 MiB and 256 x 256 x 256.
    """
    on_gpu = device.type == "cuda"
    nbytes, size = (1 << 30, 8192) if on_gpu else (1 << 22, 256)
    source = torch.empty(nbytes // dtype.itemsize, dtype=dtype, device=device).normal_()
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(a)
    found = measure(
        {"copy": [lambda: target.copy_(source)], "gemm": [lambda: torch.mm(a, b, out=product)]},
        device,
        seconds=0.5,
        rounds=rounds,
    )
    return Ceilings(2 * nbytes / found["copy"].median, 2 * size**3 / found["gemm"].median)


def _timing(samples: Sequence[float]) -> Timing:
    ordered = sorted(samples)
    tenth = len(ordered) // 10
    return Timing(
        statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], samples=len(ordered)
    )


class _WallClock:
    def __init__(self) -> None:
        self._samples: dict[str, list[float]] = {}

    def warm_up(self, name: str, calls: Sequence[Call]) -> float:
        """Call once; the seconds that a sample will take."""
        calls[0]()
        began = time.perf_counter()
        calls[-1]()
        return time.perf_counter() - began

    def sample(self, name: str, call: Call) -> object:
        began = time.perf_counter()
        result = call()
        self._samples.setdefault(name, []).append(time.perf_counter() - began)
        return result

    def samples(self) -> dict[str, list[float]]:
        return self._samples


class _EventClock:
    def __init__(self) -> None:
        self._events: dict[str, list[tuple[Any, Any]]] = {}
        self._waits: dict[str, int] = {}

    def warm_up(self, name: str, calls: Sequence[Call]) -> float:
        """Compile, fill the allocator's pool, learn how long the host is at it."""
        for i in range(3):
            calls[i % len(calls)]()
        torch.cuda.synchronize()
        began = time.perf_counter()
        calls[-1]()
        launched = time.perf_counter()
        torch.cuda.synchronize()
        host, both = launched - began, time.perf_counter() - began
        wait = min(1.5 * host + 20e-6, _LONGEST_WAIT)
        self._waits[name] = int(wait * _CYCLES)
        return wait + both

    def sample(self, name: str, call: Call) -> object:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self._waits[name])
        start.record()
        result = call()
        end.record()
        self._events.setdefault(name, []).append((start, end))
        return result

    def samples(self) -> dict[str, list[float]]:
        torch.cuda.synchronize()
        return {
            name: [start.elapsed_time(end) * 1e-3 for start, end in events]
            for name, events in self._events.items()
        }
