"""launch.max_restarts with one process: after it was killed it starts again and loses nothing.

Two ranks, and every other way to die, are in tests/faults/test_kills.py.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from dtune.checkpoint.reader import CHECKPOINTS
from dtune.runtime.status import State, Status, read_status, write_status
from dtune.train.sinks.jsonl import read_metrics
from tests.faults.injection import nothing_left, start_train, workers_of
from tests.integration.train_runs import read_json, settings

STEPS, EVERY, KILLED_AFTER = 60, 5, 12
LIMIT = 400


def test_a_process_that_starts_again_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "said.log"
    overrides = settings(
        run_dir,
        f"train.max_steps={STEPS}",
        f"checkpoint.every={EVERY}",
        "launch.max_restarts=1",
    )
    with nothing_left(run_dir):
        process = start_train(overrides, log)
        rows, deadline = run_dir / "metrics.jsonl", time.monotonic() + LIMIT
        while not rows.is_file() or rows.read_bytes().count(b"\n") < KILLED_AFTER:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        os.kill(workers_of(run_dir)[0], signal.SIGKILL)
        assert process.wait(timeout=LIMIT) == 0, log.read_text()
    status = read_status(run_dir)
    assert (status.state, status.step, status.message) == (State.done, STEPS, "")
    found = read_metrics(rows)
    (resumed,) = (int(row["step"]) for row in found if row["kind"] == "resume")
    assert resumed >= EVERY
    assert resumed % EVERY == 0
    assert [row["step"] for row in found if row["kind"] == "train"] == list(range(1, STEPS + 1))
    assert read_json(run_dir / "result.json")["steps"] == STEPS
    assert (run_dir / CHECKPOINTS / f"step-{STEPS:08d}").is_dir()


def test_a_new_attempt_takes_the_failure_of_the_one_before_back(tmp_path: Path) -> None:
    write_status(tmp_path, Status(State.failed, rank=1, message="killed"))
    write_status(tmp_path, Status(State.done))
    assert read_status(tmp_path).state is State.failed
    write_status(tmp_path, Status(State.running))
    write_status(tmp_path, Status(State.done, step=3))
    assert read_status(tmp_path) == Status(State.done, step=3, time=read_status(tmp_path).time)
