"""Steps that are timed: warm-up until nothing compiles any more, then one clock reading a step.

On a GPU the clock is the device's: an event after every step, read when all are done, so that the
host waits for nothing in between. Elsewhere it is the host's.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from dtune.bench.record import quantile

Step = Callable[[], object]


@dataclass(frozen=True)
class WarmUp:
    """The untimed steps before the timed ones."""

    seconds: float
    first_seconds: float
    """Of the first of them: compilation, caches, allocation."""
    steps: int


@dataclass(frozen=True)
class StepTimes:
    """Seconds of every timed step, in order."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the steps took longer."""
        return quantile(self.seconds, 0.5)

    @property
    def p10(self) -> float:
        """A tenth of the steps took less."""
        return quantile(self.seconds, 0.1)

    @property
    def p90(self) -> float:
        """A tenth of the steps took longer."""
        return quantile(self.seconds, 0.9)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    # Asking would import it, which takes seconds and a hundred MiB.
    if "torch._dynamo.utils" not in sys.modules:
        return 0
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def warm_up(
    step: Step,
    *,
    steps: int,
    device: torch.device,
    any_rank: Callable[[bool], bool] = bool,
) -> WarmUp:
    """Do ``steps`` steps, and as many again after each one that compiled, at most 10 times as many.

    Waits for the device after every one of them. ``any_rank`` says whether one of several ranks
    says yes: all do as many steps.
    """
    began = time.perf_counter()
    first = 0.0
    done = calm = 0
    graphs = compiled_graphs()
    while calm < steps and done < 10 * steps:
        step()
        synchronize(device)
        done += 1
        first = first or time.perf_counter() - began
        now = compiled_graphs()
        calm = 0 if any_rank(now != graphs) else calm + 1
        graphs = now
    return WarmUp(time.perf_counter() - began, first, done)


def time_steps(step: Step, *, steps: int, device: torch.device) -> StepTimes:
    """Time so many steps, one after another, without a pause between them."""
    if device.type == "cuda":
        return _by_events(step, steps, device)
    marks = [time.perf_counter()]
    for _ in range(steps):
        step()
        marks.append(time.perf_counter())
    return StepTimes(_differences(marks))


def _by_events(step: Step, steps: int, device: torch.device) -> StepTimes:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    torch.cuda.synchronize(device)
    events[0].record(torch.cuda.current_stream(device))
    for event in events[1:]:
        step()
        event.record(torch.cuda.current_stream(device))
    torch.cuda.synchronize(device)
    # elapsed_time is in milliseconds.
    return StepTimes(tuple(before.elapsed_time(after) / 1e3 for before, after in pairwise(events)))


def _differences(marks: list[float]) -> tuple[float, ...]:
    return tuple(after - before for before, after in pairwise(marks))
