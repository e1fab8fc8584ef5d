"""Whole runs under torchrun in which one rank of two has a fault, and how they end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtune.runtime.status import Status, read_status
from dtune.runtime.watch.stacks import process_state
from tests.integration.train_runs import settings

STEP_SECONDS = 8.0
CASES = {
    # A restart that is not to be used.
    "sleep": ("sleep,1,3", ("launch.max_restarts=1",)),
    "gil": ("gil,1,3", ()),
    "batches": ("batches,1,3", ()),
    "save": ("save,1,1", (f"watch.save={STEP_SECONDS}",)),
    "restart": (
        "stop,1,3",
        ("watch.on_hang=restart", "launch.max_restarts=1", "checkpoint.every=1"),
    ),
    "oom": ("oom,1,3", ()),
}
"""Fault, rank and step; and settings."""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    run_dir: Path
    code: int
    said: str
    status: Status
    fault_at: float
    """When it happened, in seconds since the epoch."""
    ranks_at: float
    """When the last of its ranks was gone; the launcher and torchrun end after them."""

    @property
    def named_seconds(self) -> float:
        """From the fault to the last word of the status."""
        return self.status.time - self.fault_at

    @property
    def gone_seconds(self) -> float:
        """From the fault to the end of the last rank."""
        return self.ranks_at - self.fault_at


def ranks_are_gone(run_dir: Path) -> bool:
    """Whether both have started, and neither runs."""
    told = list(run_dir.glob("process-*"))
    numbers = [path.read_text() for path in told]
    return len(told) == 2 and all(
        number and process_state(int(number)) in ("", "Z", "X") for number in numbers
    )


def start(run_dir: Path, name: str) -> subprocess.Popen[str]:
    """One of CASES."""
    fault, more = CASES[name]
    common = (
        "train.max_steps=6",
        "train.global_batch_size=8",
        "parallel=ddp",
        "launch.nproc=2",
        f"watch.step={STEP_SECONDS}",
        "watch.step_factor=0",
    )
    return subprocess.Popen(
        [sys.executable, "-m", "tests.faults.watch_worker", "launch"]  # noqa: RUF005
        + settings(run_dir, *common, *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DTUNE_TEST_FAULT": fault},
    )


def run_cases(folder: Path, names: Sequence[str]) -> dict[str, Ended]:
    """Side by side, since most of a short run is starting Python."""
    processes = {name: start(folder / name, name) for name in names}
    over: set[str] = set()
    ranks_ends: dict[str, float] = {}
    deadline = time.monotonic() + 400
    try:
        while len(over) < len(processes) and time.monotonic() < deadline:
            time.sleep(0.05)
            for name, process in processes.items():
                if name not in ranks_ends and ranks_are_gone(folder / name):
                    ranks_ends[name] = time.time()
                if process.poll() is not None:
                    over.add(name)
    finally:
        for process in processes.values():
            process.kill()
    results = {}
    for name, process in processes.items():
        said = process.communicate()[0]
        assert name in over, f"{name}: {said}"
        assert (folder / name / "fault").is_file(), f"{name}: {said}"
        results[name] = Ended(
            folder / name,
            process.returncode,
            said,
            read_status(folder / name),
            (folder / name / "fault").stat().st_mtime,
            ranks_ends[name],
        )
    return results
