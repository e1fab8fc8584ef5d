"""Tokens per second of training alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Meter:
    """Clock of the training loop: evaluation, saving and the first steps are kept apart.

    A lap ends where the host has waited for the device, so that its seconds are the device's too.
    """

    untimed_steps: int
    """First steps of this process that are left out of the totals: compilation, caches."""

    seconds: float = 0.0
    tokens: int = 0
    targets: int = 0
    steps: int = 0
    excluded: dict[str, float] = field(default_factory=dict)
    """Seconds by what was done instead of training: warm-up, evaluate, save."""

    _started: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """Begin a lap."""
        self._started = time.perf_counter()

    def lap(self, *, steps: int, tokens: int, targets: int) -> float:
        """End a lap of some steps and begin the next; its seconds."""
        now = time.perf_counter()
        seconds, self._started = now - self._started, now
        if self.steps < self.untimed_steps:
            self.excluded["warm-up"] = self.excluded.get("warm-up", 0.0) + seconds
        else:
            self.seconds += seconds
            self.tokens += tokens
            self.targets += targets
        self.steps += steps
        return seconds

    @contextmanager
    def apart(self, what: str) -> Iterator[None]:
        """Around what is not training: its time counts under its own name."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self.excluded[what] = self.excluded.get(what, 0.0) + spent
            self._started += spent

    @property
    def tokens_per_second(self) -> float:
        """All tokens but padding, over the timed laps; 0 before the first."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def targets_per_second(self) -> float:
        """Trained tokens over the timed laps; 0 before the first."""
        return self.targets / self.seconds if self.seconds else 0.0
