"""Whole runs under torchrun in which a rank hangs or is out of memory: named, and ended."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from dtune.runtime.status import State, Status, read_status
from dtune.runtime.watch.stacks import process_state
from dtune.train.sinks.jsonl import read_metrics
from tests.integration.train_runs import settings

STEP_SECONDS = 8.0
CASES = {
    "sleep": ("sleep,1,3", ()),
    "restart": (
        "stop,1,3",
        ("watch.on_hang=restart", "launch.max_restarts=1", "checkpoint.every=1"),
    ),
    "oom": ("oom,1,3", ()),
}


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    run_dir: Path
    code: int
    said: str
    status: Status
    last_step: float
    """When the last step before the fault was written down, since the epoch."""
    ranks_at: float
    """When the last of its ranks was gone; the launcher and torchrun end after them."""


def ranks_are_gone(run_dir: Path) -> bool:
    """Whether both have started, and neither runs."""
    told = list(run_dir.glob("process-*"))
    numbers = [path.read_text() for path in told]
    return len(told) == 2 and all(
        number and process_state(int(number)) in ("", "Z", "X") for number in numbers
    )


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Side by side, since most of a short run is starting Python."""
    folder = tmp_path_factory.mktemp("hangs")
    common = (
        "train.max_steps=6",
        "train.global_batch_size=8",
        "parallel=ddp",
        "launch.nproc=2",
        f"watch.step={STEP_SECONDS}",
        "watch.step_factor=0",
    )
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "tests.faults.watch_worker", "launch"]  # noqa: RUF005
            + settings(folder / name, *common, *more),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DTUNE_TEST_FAULT": fault},
        )
        for name, (fault, more) in CASES.items()
    }
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
        results[name] = Ended(
            folder / name,
            process.returncode,
            said,
            read_status(folder / name),
            (folder / name / "metrics.jsonl").stat().st_mtime,
            ranks_ends[name],
        )
    return results


@pytest.mark.slow
def test_a_rank_that_never_comes_to_a_collective_call_is_named_and_the_run_ends(
    ended: dict[str, Ended],
) -> None:
    it = ended["sleep"]
    assert it.code == 1, it.said
    status = it.status
    assert (status.state, status.rank, status.section, status.step) == (State.hung, 1, "step", 3)
    assert "rank 1" in status.message
    assert "in _sleep" in status.message
    assert "waiting: rank 0 in step 3, backward pass" in status.message
    named, gone = status.time - it.last_step, it.ranks_at - it.last_step
    sys.stdout.write(
        f"hung, time-out {STEP_SECONDS:.0f} s: named after {named:.1f} s, all ranks gone "
        f"after {gone:.1f} s\n"
    )
    assert named < STEP_SECONDS + 10
    assert gone < STEP_SECONDS + 30
    stacks = (it.run_dir / "logs" / "stacks-rank-0.txt").read_text()
    assert "in train_step" in stacks


@pytest.mark.slow
def test_a_run_that_hangs_starts_again_and_loses_nothing_where_it_is_told_to(
    ended: dict[str, Ended],
) -> None:
    it = ended["restart"]
    assert it.code == 0, it.said
    assert it.status.state is State.done
    assert "it is stopped by a signal" in it.said
    rows = read_metrics(it.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 7))
    assert any(row["kind"] == "resume" for row in rows)


@pytest.mark.slow
def test_a_rank_out_of_memory_ends_all_soon_and_says_what_would_help(
    ended: dict[str, Ended],
) -> None:
    it = ended["oom"]
    assert it.code == 1, it.said
    assert (it.status.state, it.status.rank, it.status.step) == (State.failed, 1, 3)
    message = it.status.message
    assert "At micro batch 2 of 2: 2 rows x" in message
    assert "of lengths" in message
    assert "train.micro_batch_size=1 saves" in message
    # The rank that failed is shown before what the others say of it.
    assert it.said.index("_out_of_memory") < it.said.index("exited with")
    assert "Connection closed by peer" not in it.said
    assert it.status.hopeless
    assert list(read_metrics(it.run_dir / "metrics.jsonl"))[-1]["step"] == 2
    told, gone = it.status.time - it.last_step, it.ranks_at - it.last_step
    sys.stdout.write(f"out of memory: told after {told:.1f} s, all ranks gone after {gone:.1f} s\n")
    # 10 s where they have processors to themselves: 8 s at most to count what would help.
    assert gone < 30
