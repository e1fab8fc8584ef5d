"""Looks over a contestant's shoulder: when its steps end, what it loses, what its gradients are."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from benchmarks.peers.work import Work
from dtune.bench.memory import PeakMeter, Peaks
from dtune.bench.timing import compiled_graphs, synchronize


@dataclass
class Watch:
    """Told by a contestant of every optimizer step; no timed one waits for the device."""

    work: Work
    losses: list[torch.Tensor] = field(default_factory=list)
    """Mean loss of each step, on the device."""
    gradient_problems: list[str] = field(default_factory=list)
    gradients_seen: int = 0
    """Trained tensors whose gradients were looked at."""
    graphs: list[int] = field(default_factory=list)
    """Graphs that torch.compile had made when warm-up ended, and when the timed steps did."""
    peaks: Peaks = field(default_factory=lambda: Peaks(None, None, None, None))
    """From the build of the model to the last timed step."""
    load_seconds: float = 0.0
    first_step_seconds: float = 0.0
    warm_up_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._device = torch.device(self.work.device)
        self._steps = 0
        self._walls: list[float] = []
        self._cpu: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self._loss: torch.Tensor | None = None
        self._meter: PeakMeter | None = None
        self._building = self._training = 0.0

    def start_building(self) -> None:
        """Libraries are imported, and the model is about to be built."""
        self._meter = PeakMeter(self._device)
        self._building = time.perf_counter()

    def start_training(self) -> None:
        """All is ready for the first step."""
        self._training = time.perf_counter()
        self.load_seconds = self._training - self._building

    @property
    def wants_gradients(self) -> bool:
        """Whether the gradients of the step that is being done are to be shown; never timed."""
        return self._steps + 1 in (self.work.warmup_steps, self.work.total_steps)

    def add_loss(self, loss: torch.Tensor) -> None:
        """Take note of one forward pass's share of the step's mean loss."""
        share = loss.detach().float().reshape(())
        self._loss = share.clone() if self._loss is None else self._loss + share

    def see_gradients(self, named: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        """Look at the gradients of everything that is trained."""
        trained = [(name, p.grad) for name, p in named if p.requires_grad]
        self.gradients_seen = len(trained)
        for name, gradient in trained:
            if problem := problem_of(gradient):
                self.gradient_problems.append(f"step {self._steps + 1}, {name}: {problem}")

    def end_step(self) -> None:
        """One optimizer step is over."""
        assert self._loss is not None, "no loss was shown"
        self.losses.append(self._loss)
        self._loss = None
        self._steps += 1
        if self._steps == 1:
            synchronize(self._device)
            self.first_step_seconds = time.perf_counter() - self._training
        if self._steps == self.work.warmup_steps:
            self._begin()
        elif self.work.warmup_steps < self._steps < self.work.total_steps:
            self._mark()
        if self._steps == self.work.total_steps - 1:
            self._end()

    def _begin(self) -> None:
        synchronize(self._device)
        self.warm_up_seconds = time.perf_counter() - self._training
        self.graphs.append(compiled_graphs())
        self._mark()

    def _mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        self._walls.append(time.perf_counter())
        self._cpu.append(time.process_time())

    def _end(self) -> None:
        synchronize(self._device)
        assert self._meter is not None, "start_building was not called"
        self.peaks = self._meter.read()
        self.graphs.append(compiled_graphs())

    def step_seconds(self) -> tuple[float, ...]:
        """Each timed step: from the end of one to the end of the next, batches included."""
        if self._device.type != "cuda":
            return differences(self._walls)
        return tuple(begin.elapsed_time(end) / 1e3 for begin, end in pairwise(self._events))

    def cpu_seconds(self) -> tuple[float, ...]:
        """What all threads of the process have computed in each timed step."""
        return differences(self._cpu)


def differences(marks: Sequence[float]) -> tuple[float, ...]:
    """From each mark to the next."""
    return tuple(end - begin for begin, end in pairwise(marks))


def problem_of(gradient: torch.Tensor | None) -> str:
    """Why a gradient shows that nothing was learned; empty where it is as it must be."""
    if gradient is None:
        return "no gradient"
    if not bool(torch.isfinite(gradient).all()):
        return "a gradient that is not finite"
    return "" if bool(gradient.any()) else "a gradient of zeros"
