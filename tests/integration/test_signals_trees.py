"""Real processes: signals while a run starts, and to every process of its tree at once."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dtune.checkpoint.reader import CHECKPOINTS
from dtune.runtime.status import State, read_status
from dtune.runtime.watch.stacks import process_state
from tests.faults.injection import INJECTED, family, kill, nothing_left, start_train
from tests.integration.train_runs import kept, settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EX_TEMPFAIL = 75
PATIENCE = 300.0
NUMBERS = (signal.SIGTERM, signal.SIGUSR1)
LOADING = "dtune.models.load open_weights"
MEETING = "dtune.runtime.world World.start"


@dataclass(frozen=True)
class Started:
    """A run, and where it is."""

    process: subprocess.Popen[bytes]
    run_dir: Path
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def start(folder: Path, *more: str, env: dict[str, str] | None = None) -> Started:
    folder.mkdir()
    run_dir, log = folder / "run", folder / "said.log"
    return Started(start_train(settings(run_dir, *more), log, env), run_dir, log)


def wait_until(is_so: Callable[[], bool], it: Started) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert it.process.poll() is None, it.said()
        assert time.monotonic() < deadline, it.said()
        time.sleep(0.01)


def is_training(run_dir: Path) -> bool:
    path = run_dir / "metrics.jsonl"
    return path.is_file() and path.read_bytes().count(b"\n") >= 3


@pytest.mark.parametrize(
    ("where", "number"), [(LOADING, NUMBERS[0]), (LOADING, NUMBERS[1]), (MEETING, NUMBERS[0])]
)
def test_a_signal_while_a_run_starts_ends_it_with_nothing_saved(
    tmp_path: Path, where: str, number: signal.Signals
) -> None:
    mark = tmp_path / "is-there"
    known = os.environ.get("PYTHONPATH")
    path = f"{INJECTED}{os.pathsep}{known}" if known else str(INJECTED)
    env = {"PYTHONPATH": path, "DTUNE_TEST_WAIT_IN": f"{where} {mark}"}
    it = start(tmp_path / "it", env=env)
    with nothing_left(it.run_dir):
        wait_until(mark.is_file, it)
        it.process.send_signal(number)
        code = it.process.wait(PATIENCE)
    assert code == EX_TEMPFAIL, it.said()
    assert f"stopped by {number.name} with nothing to save yet" in it.said()
    assert "Traceback" not in it.said()
    status = read_status(it.run_dir)
    assert (status.state, status.step) == (State.preempted, 0)
    assert list(it.run_dir.glob(f"{CHECKPOINTS}/*")) == []


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_to_every_process_of_a_run_saves_one_checkpoint(
    tmp_path: Path, number: signal.Signals
) -> None:
    more = ("train.max_steps=100000", "parallel=ddp", "launch.nproc=2", "checkpoint.every=0")
    it = start(tmp_path / "it", *more)
    with nothing_left(it.run_dir):
        wait_until(lambda: is_training(it.run_dir), it)
        tree = family(it.process.pid)
        # dtune, the agent, two ranks and their watchers.
        assert len(tree) >= 6
        for pid in tree:
            kill(pid, number)
        code = it.process.wait(PATIENCE)
    assert code == EX_TEMPFAIL, it.said()
    status = read_status(it.run_dir)
    assert (status.state, status.message) == (State.preempted, "")
    assert kept(it.run_dir) == [status.step]
    deadline = time.monotonic() + PATIENCE
    while any(process_state(pid) not in ("", "Z", "X") for pid in tree):
        assert time.monotonic() < deadline
        time.sleep(0.01)
