"""How long a rank works before it meets the others: what tells a slow rank from those that wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class OwnTime:
    """Sums up the forward passes of a step, and the wait for its batches.

    All ranks take as long for a step, as they wait for the slowest one in backward. Forward passes
    meet nobody under ``single``, ``ddp``, ``zero1`` and ``zero2``; under ``fsdp`` and ``zero3``
    ranks wait for each other block by block, and the numbers come closer to one another.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._on_device = device.type == "cuda"
        self._events: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def add(self, seconds: float) -> None:
        """Count what the host has waited for."""
        self.seconds += seconds

    @contextmanager
    def forward(self) -> Iterator[None]:
        """A forward pass; on a GPU its time there is counted once it is known, without waiting."""
        if not self._on_device:
            start = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - start
            return
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._events.append((begin, end))

    def take(self) -> float:
        """Seconds since the last call, and begin anew."""
        while self._events and self._events[0][1].query():
            begin, end = self._events.popleft()
            self.seconds += begin.elapsed_time(end) / 1e3
        taken, self.seconds = self.seconds, 0.0
        return taken
