"""Two commands in one run folder: the second leaves it as it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dtune.checkpoint.layout import list_steps
from dtune.checkpoint.reader import CHECKPOINTS
from dtune.runtime.lock import LOCK
from dtune.runtime.status import State, read_status
from tests.integration.train_runs import settings


def start(argv: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dtune", "train", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_second_run_is_refused_and_the_first_goes_on_until_it_is_killed(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    argv = settings(run_dir, "train.max_steps=100000", "checkpoint.every=2")
    first = start(argv)
    try:
        deadline = time.monotonic() + 400
        while not list_steps(run_dir / CHECKPOINTS):
            assert first.poll() is None, first.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        config = (run_dir / "config.yaml").read_bytes()
        second = start([*argv, "optim.lr=1", "resume=auto"])
        said = second.communicate(timeout=300)[0]
        assert second.returncode == 2, said
        assert f"in use by process {first.pid} on " in said
        assert (run_dir / "config.yaml").read_bytes() == config
        assert read_status(run_dir).state is State.running
        first.send_signal(signal.SIGKILL)
        first.communicate()
        (holder,) = json.loads((run_dir / LOCK).read_text())["holders"]
        assert holder["pid"] == first.pid
        done = max(list_steps(run_dir / CHECKPOINTS))
        third = start([*argv, f"train.max_steps={done + 2}", "resume=auto"])
        said = third.communicate(timeout=400)[0]
        assert third.returncode == 0, said
        assert f"was left by process {first.pid} on " in said
        assert "taken over" in said
        assert not (run_dir / LOCK).exists()
        assert read_status(run_dir).state is State.done
    finally:
        first.kill()
