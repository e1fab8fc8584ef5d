"""A run that is asked to stop while its ranks start, for the first time or again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dtune.runtime.status import State, Status, read_status, write_status

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
