"""A run that is asked to stop while its ranks start, for the first time or again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dtune_launch.schema.local import LocalConfig
from dtune_launch.spec import JobSpec

from dtune.commands.train import launch
from dtune.runtime.signals import StopRequest
from dtune.runtime.status import EXIT_CODES, State, Status, read_status, write_status

RANK = """
import os, sys, time
from dtune.runtime.signals import StopRequest
stop = StopRequest()
stop.install(at_once=True, run_dir=sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
os.kill(os.getpid(), 15)
time.sleep(60)
"""
FAILED = Status(State.failed, rank=1, message="rank 1 was killed by SIGSEGV")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize(
    ("before", "while_it_starts", "after"),
    [
        (Status(State.running), None, State.preempted),
        # Of the attempt before: torchrun is starting the ranks again.
        (FAILED, None, State.preempted),
        # Of this one: what ends the others is its echo.
        (Status(State.running), FAILED, State.failed),
        (FAILED, FAILED, State.failed),
        (Status(State.done), None, State.done),
    ],
)
def test_only_a_failure_of_this_attempt_outweighs_the_signal(
    tmp_path: Path,
    number: signal.Signals,
    before: Status,
    while_it_starts: Status | None,
    after: State,
) -> None:
    write_status(tmp_path, before)
    code = RANK.replace("15", str(int(number)))
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as rank:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "ready\n"
        if while_it_starts is not None:
            began = read_status(tmp_path).time + 1e-6
            write_status(tmp_path, while_it_starts, since=began)
        rank.communicate("\n", timeout=120)
    assert read_status(tmp_path).state is after


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_signal_before_the_ranks_are_started_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nproc: int
) -> None:
    write_status(tmp_path, Status(State.running))
    started: list[list[str]] = []
    monkeypatch.setattr("dtune_launch.local._start", lambda *given: started.append([*given]))
    stop = StopRequest()
    job = JobSpec("dtune.worker", (str(tmp_path),), tmp_path, nproc=nproc, max_restarts=1)
    with stop.in_charge():
        stop.signal_name = "SIGTERM"
        assert launch(job, LocalConfig(), stop) == EXIT_CODES[State.preempted]
    assert started == []
    assert read_status(tmp_path).state is State.preempted


def test_a_status_that_a_full_disk_has_cut_off_does_not_hide_how_the_job_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "status.json").write_text('{"state": "run')
    monkeypatch.setattr("dtune_launch.local._run", lambda *given: 7)
    job = JobSpec("dtune.worker", (str(tmp_path),), tmp_path, nproc=2)
    with StopRequest().in_charge() as stop:
        assert launch(job, LocalConfig(), stop) == 7
    assert "status.json cannot be read" in capsys.readouterr().err
