"""Peaks of memory: of the device by its allocator, of the process by the kernel."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile

from dtune.measure.storages import distinct_bytes

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Peaks:
    """Most bytes held at once since `PeakMeter` began; None where it cannot be told."""

    allocated: int | None
    reserved: int | None
    rss: int | None
    base_rss: int | None
    """Resident when it began."""


class PeakMeter:
    """Begins to watch when it is made; what was held before and freed does not count."""

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self._device = device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        self._resets = reset_peak_rss()
        self._base = resident_bytes("VmRSS") if self._resets else None

    @property
    def notes(self) -> tuple[str, ...]:
        """Why a number is missing."""
        if self._resets:
            return ()
        return ("peak RSS: this system does not let a process reset its own peak",)

    def read(self) -> Peaks:
        """The peaks so far."""
        rss = resident_bytes("VmHWM") if self._resets else None
        if self._device.type != "cuda":
            return Peaks(None, None, rss, self._base)
        return Peaks(
            torch.cuda.max_memory_allocated(self._device),
            torch.cuda.max_memory_reserved(self._device),
            rss,
            self._base,
        )


def reset_peak_rss() -> bool:
    """Have the kernel begin anew with this process's peak; whether it did (Linux alone can)."""
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return True


def resident_bytes(key: str) -> int:
    """``VmRSS``, what is resident now, or ``VmHWM``, its peak; Linux."""
    found = re.search(rf"^{key}:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None, key
    return int(found.group(1)) * 1024


def count_tensors(step: Callable[[], object]) -> int:
    """Most bytes of tensors at once in a step of this CPU; does one, which is not to be timed.

    What Python holds before, and the most that the allocator gives out beyond what it takes back
    until the end. A process's resident memory says less: it has libraries and free pages in it.
    """
    gc.collect()
    held = [
        one
        for one in gc.get_objects()
        if issubclass(type(one), torch.Tensor)
        and not isinstance(one, FakeTensor)
        and one.device.type == "cpu"
    ]
    before = distinct_bytes(held)
    del held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    # Sizes, below 0 where memory is given back; not of what was taken before the profiler began.
    events = profiler.profiler.kineto_results.events()
    taken = [(one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]"]
    changes = [size for _, size in sorted(taken, key=lambda one: one[0])]
    return before + max(accumulate(changes), default=0)
