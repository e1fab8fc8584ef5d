"""A rank that is killed while the run starts, when no rank has met another yet."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dtune.runtime.status import State, read_status
from tests.faults.injection import kill, nothing_left, start_train, workers_of
from tests.integration.train_runs import settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_others_that_the_agent_ends_do_not_say_that_the_run_was_preempted(
    tmp_path: Path, rank: int
) -> None:
    run_dir, log = tmp_path / "run", tmp_path / "said.log"
    overrides = settings(
        run_dir,
        "train.max_steps=2",
        "parallel=ddp",
        "launch.nproc=2",
        "launch.max_restarts=1",
        "resume=auto",
    )
    with nothing_left(run_dir):
        run = start_train(overrides, log)
        deadline = time.monotonic() + 300
        while len(ranks := workers_of(run_dir)) < 2:
            assert run.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.005)
        kill(ranks[rank])
        code = run.wait(300)
    said = log.read_text()
    assert code == 0, said
    assert read_status(run_dir).state is State.done
    assert f"attempt ended: rank {rank} of this machine was killed by SIGKILL" in said
    assert f"starting again: rank {rank} failed at step 0: rank {rank} " in said
