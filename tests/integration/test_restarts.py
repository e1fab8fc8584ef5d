"""launch.max_restarts: after a rank was killed, the ranks start again and lose nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from dtune.checkpoint.reader import CHECKPOINTS
from dtune.runtime.status import State, Status, read_status, write_status
from dtune.train.sinks.jsonl import read_metrics
from tests.integration.train_runs import read_json, settings

STEPS = 60
EVERY = 5
KILLED_AFTER = 12
CASES = {
    "two": (1, ("parallel=ddp", "launch.nproc=2")),
    "one": (0, ()),
}
"""The rank that is killed, and how the run is launched."""


@dataclass(frozen=True)
class Ended:
    """How a run ended."""

    run_dir: Path
    code: int
    said: str


def find_rank(run_dir: Path, rank: int) -> int:
    """Process of a rank of a run."""
    wanted = {f"RANK={rank}".encode(), b"TORCHELASTIC_RESTART_COUNT=0"}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (path / "cmdline").read_bytes().split(b"\0")
            if not {str(run_dir).encode(), b"dtune.worker"} <= set(arguments):
                continue
            if wanted <= set((path / "environ").read_bytes().split(b"\0")):
                return int(path.name)
        except (FileNotFoundError, ProcessLookupError):
            continue  # It has just ended.
    raise AssertionError(f"no rank {rank} of {run_dir}")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """Side by side, since most of a short run is starting Python."""
    folder = tmp_path_factory.mktemp("restarts")
    common = (f"train.max_steps={STEPS}", f"checkpoint.every={EVERY}", "launch.max_restarts=1")
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "dtune", "train", *settings(folder / name, *common, *more)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for name, (_, more) in CASES.items()
    }
    try:
        waiting, deadline = dict(processes), time.monotonic() + 240
        while waiting:
            assert time.monotonic() < deadline, f"no steps of {list(waiting)}"
            time.sleep(0.01)
            for name, process in list(waiting.items()):
                assert process.poll() is None, process.communicate()
                rows = folder / name / "metrics.jsonl"
                if rows.is_file() and rows.read_bytes().count(b"\n") >= KILLED_AFTER:
                    os.kill(find_rank(folder / name, CASES[name][0]), signal.SIGKILL)
                    del waiting[name]
        said = {name: process.communicate(timeout=240)[0] for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
    return {
        name: Ended(folder / name, process.returncode, said[name])
        for name, process in processes.items()
    }


@pytest.mark.parametrize("name", list(CASES))
def test_ranks_that_start_again_go_on_from_the_last_checkpoint(
    ended: dict[str, Ended], name: str
) -> None:
    it = ended[name]
    assert it.code == 0, it.said
    status = read_status(it.run_dir)
    assert (status.state, status.step, status.message) == (State.done, STEPS, "")
    rows = read_metrics(it.run_dir / "metrics.jsonl")
    (resumed,) = (int(row["step"]) for row in rows if row["kind"] == "resume")
    assert resumed >= EVERY
    assert resumed % EVERY == 0
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, STEPS + 1))
    assert read_json(it.run_dir / "result.json")["steps"] == STEPS
    assert (it.run_dir / CHECKPOINTS / f"step-{STEPS:08d}").is_dir()


def test_a_new_attempt_takes_the_failure_of_the_one_before_back(tmp_path: Path) -> None:
    write_status(tmp_path, Status(State.failed, rank=1, message="killed"))
    write_status(tmp_path, Status(State.done))
    assert read_status(tmp_path).state is State.failed
    write_status(tmp_path, Status(State.running))
    write_status(tmp_path, Status(State.done, step=3))
    assert read_status(tmp_path) == Status(State.done, step=3, time=read_status(tmp_path).time)
