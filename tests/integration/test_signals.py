"""Real processes: stopped by a signal with everything saved, or killed, and gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from dtune.checkpoint.reader import CHECKPOINTS
from dtune.cli import main
from dtune.runtime.status import State, read_status
from dtune.train.sinks.jsonl import read_metrics
from tests.integration.runs import exported
from tests.integration.train_runs import metrics, read_json, settings

STEPS = 60
SIGNAL_AFTER = 7
EX_TEMPFAIL = 75


@dataclass(frozen=True)
class Case:
    """A run, and the signal that ends it."""

    number: signal.Signals
    more: tuple[str, ...] = ()


CASES = {
    "term": Case(signal.SIGTERM),
    "two": Case(signal.SIGUSR1, ("parallel=ddp", "launch.nproc=2")),
    "kill": Case(signal.SIGKILL),
}
COMMON = (f"train.max_steps={STEPS}", "peft.dropout=0.1", "checkpoint.every=5")


@dataclass(frozen=True)
class Ended:
    """How the first attempt of a case ended."""

    run_dir: Path
    argv: list[str]
    code: int
    said: str


def is_training(run_dir: Path) -> bool:
    path = run_dir / "metrics.jsonl"
    return path.is_file() and path.read_bytes().count(b"\n") >= SIGNAL_AFTER


def is_worth_it(run_dir: Path, case: Case) -> bool:
    """A killed run goes on from its last checkpoint, which is written beside the steps."""
    return case.number != signal.SIGKILL or (run_dir / CHECKPOINTS / "LATEST").is_file()


def signal_when_training(folder: Path, processes: dict[str, subprocess.Popen[str]]) -> None:
    """Send each process its signal as soon as it has done some steps."""
    deadline = time.monotonic() + 240
    waiting = dict(processes)
    while waiting:
        assert time.monotonic() < deadline, f"no steps of {list(waiting)}"
        time.sleep(0.01)
        for name, process in list(waiting.items()):
            if is_training(folder / name) and is_worth_it(folder / name, CASES[name]):
                process.send_signal(CASES[name].number)
                del waiting[name]
            elif process.poll() is not None:
                raise AssertionError(f"{name} ended by itself: {process.communicate()}")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """All of them side by side, since most of a short run is starting Python."""
    folder = tmp_path_factory.mktemp("signals")
    argv = {
        name: ["train", *settings(folder / name, *COMMON, *case.more)]
        for name, case in CASES.items()
    }
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "dtune", *given, "resume=auto"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for name, given in argv.items()
    }
    try:
        signal_when_training(folder, processes)
        said = {name: process.communicate(timeout=240) for name, process in processes.items()}
    finally:
        for process in processes.values():
            process.kill()
    return {
        name: Ended(folder / name, argv[name], process.returncode, "".join(said[name]))
        for name, process in processes.items()
    }


@pytest.fixture(autouse=True)
def _own_threads_and_signals() -> Iterator[None]:
    """Sums in the order of the processes above; and pytest gets its signals back."""
    threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["term", "two"])
def test_a_signal_saves_and_the_same_command_goes_on_to_the_end(
    ended: dict[str, Ended], name: str
) -> None:
    it = ended[name]
    assert it.code == EX_TEMPFAIL, it.said
    status = read_status(it.run_dir)
    assert (status.state, status.message) == (State.preempted, "")
    assert SIGNAL_AFTER <= status.step < STEPS
    assert (it.run_dir / CHECKPOINTS / f"step-{status.step:08d}").is_dir()
    assert not (it.run_dir / "adapter").exists()
    assert f"stopping at step {status.step} as asked by {CASES[name].number.name}" in it.said

    assert main([*it.argv, "resume=auto"]) == 0
    assert read_status(it.run_dir).state is State.done
    rows = read_metrics(it.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "resume"] == [status.step]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, STEPS + 1))
    assert read_json(it.run_dir / "result.json")["steps"] == STEPS


def test_a_killed_run_goes_on_as_if_nothing_had_been(
    ended: dict[str, Ended], tmp_path: Path
) -> None:
    killed, whole = ended["kill"], tmp_path / "whole"
    assert killed.code == -signal.SIGKILL, killed.said
    assert read_status(killed.run_dir).state is State.running
    assert main([*killed.argv, "resume=auto"]) == 0
    assert main(["train", *settings(whole, *COMMON)]) == 0
    resumed = [r for r in read_metrics(killed.run_dir / "metrics.jsonl") if r["kind"] == "resume"]
    assert [int(row["step"]) % 5 for row in resumed] == [0]
    assert metrics(killed.run_dir, "train") == metrics(whole, "train")
    assert exported(killed.run_dir) == exported(whole) != {}


def test_a_signal_before_the_first_step_saves_nothing_and_is_no_failure(tmp_path: Path) -> None:
    from dtune.runtime.signals import StopRequest
    from tests.integration.train_runs import assembled

    with assembled(settings(tmp_path / "run")) as it:
        stop = StopRequest()
        stop.install()
        os.kill(os.getpid(), signal.SIGTERM)
        it.trainer.stop = stop
        assert it.finish()[0] is State.preempted
    assert list((tmp_path / "run" / CHECKPOINTS).iterdir()) == []
    assert main(["train", *settings(tmp_path / "run"), "resume=auto"]) == 0
