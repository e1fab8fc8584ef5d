"""``dtune bench`` as a command, on whatever device this machine has."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

from dtune.bench.record import CaseResult, Measured, Status, read_jsonl

QUICK = ("bench.warm_up=1", "bench.steps=3", "bench.repeats=1")
SMALL = (
    *(*QUICK, "model=tiny", "train.micro_batch_size=1", "train.global_batch_size=2"),
    *("data.max_length=32", "optim.lr=1e-3", "bench.ceiling_seconds=0"),
)


def bench(*settings: str, memory: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command; ``memory``: address space that each of its processes may have."""

    def limit() -> None:
        if memory:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    return subprocess.run(
        [sys.executable, "-m", "dtune", "bench", *settings],
        capture_output=True,
        text=True,
        timeout=550,
        preexec_fn=limit,
    )


def results_of(folder: Path) -> dict[str, CaseResult]:
    return {one.case: one for one in read_jsonl(folder / "results.jsonl")}


def assert_measured(result: CaseResult, *, on_gpu: bool) -> Measured:
    """A case of three steps that trains has its numbers."""
    assert result.status is Status.ok, result.reason
    one = result.measured
    assert one is not None
    assert len(one.step_seconds) == 3
    assert min(one.step_seconds) > 0
    assert one.launches_per_step
    assert one.launches_of == ("kernels" if on_gpu else "operations")
    assert bool(one.peak_allocated_bytes) == on_gpu
    assert bool(one.counted_bytes) != on_gpu
    assert one.tensor_bytes
    # Of the device or the process, what is held and what more is reserved or mapped.
    whole = one.peak_reserved_bytes if on_gpu else one.peak_rss_bytes
    assert whole is not None
    assert whole >= one.tensor_bytes
    assert one.plan_error is not None
    assert one.loss_last < one.loss_first
    return one


def assert_as_planned(one: Measured) -> None:
    """The peak of one device, which nothing is sent to or from, is that of `dtune plan`."""
    assert one.devices == 1
    assert one.plan_error is not None
    assert abs(one.plan_error) < 0.1
