"""Whole runs under torchrun in which a rank hangs or is out of memory: named, and ended."""

from __future__ import annotations

import sys

import pytest

from dtune.runtime.status import State
from dtune.train.sinks.jsonl import read_metrics
from tests.faults.hang_runs import CASES, STEP_SECONDS, Ended, run_cases

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SAYS = {
    "sleep": ("in _sleep", "waiting: rank 0 in step 3, backward pass"),
    "gil": ("its lock is held", "waiting: rank 0 in step 3, backward pass"),
    "batches": ("waiting for its next batch", "in prefetch"),
    "save": ("hangs in save after step 6", "in _sleep"),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    folder = tmp_path_factory.mktemp("hangs")
    # Alone: it counts for five seconds what would help, and ten are asked for.
    alone = run_cases(folder, ["oom"])
    return alone | run_cases(folder, [name for name in CASES if name != "oom"])


@pytest.mark.parametrize("name", SAYS)
def test_a_rank_that_others_wait_for_is_named_and_the_run_ends(
    ended: dict[str, Ended], name: str
) -> None:
    it = ended[name]
    assert it.code == 1, it.said
    status = it.status
    section = "save" if name == "save" else "step"
    assert (status.state, status.rank, status.section) == (State.hung, 1, section), status
    for words in SAYS[name]:
        assert words in status.message
    sys.stdout.write(
        f"{name}, time-out {STEP_SECONDS:.0f} s: named after {it.named_seconds:.1f} s, all ranks "
        f"gone after {it.gone_seconds:.1f} s\n"
    )
    assert it.named_seconds < STEP_SECONDS + 10
    assert it.gone_seconds < STEP_SECONDS + 30


def test_stacks_of_a_rank_that_waits_say_where(ended: dict[str, Ended]) -> None:
    stacks = (ended["sleep"].run_dir / "logs" / "stacks-rank-0.txt").read_text()
    assert "in train_step" in stacks


def test_ranks_that_are_started_again_after_a_hang_do_nothing_more(
    ended: dict[str, Ended],
) -> None:
    it = ended["sleep"]
    rows = read_metrics(it.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
    assert it.status.step == 3
    assert "starting again" not in it.said


def test_a_run_that_hangs_starts_again_and_loses_nothing_where_it_is_told_to(
    ended: dict[str, Ended],
) -> None:
    it = ended["restart"]
    assert it.code == 0, it.said
    assert it.status.state is State.done
    assert "it is stopped by a signal" in it.said
    assert "starting again" in it.said
    rows = read_metrics(it.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 7))
    assert any(row["kind"] == "resume" for row in rows)


def test_a_rank_out_of_memory_ends_all_soon_and_says_what_would_help(
    ended: dict[str, Ended],
) -> None:
    it = ended["oom"]
    assert it.code == 1, it.said
    assert (it.status.state, it.status.rank, it.status.step) == (State.failed, 1, 3)
    message = it.status.message
    assert "At micro batch 2 of 2: 2 rows x" in message
    assert "of lengths" in message
    assert message.count(" saves ") == 3
    assert "train.micro_batch_size=1 saves" in message
    # The rank that failed is shown before what the others say of it.
    assert it.said.index("_out_of_memory") < it.said.index("exited with")
    assert "Connection closed by peer" not in it.said
    assert it.status.hopeless
    assert list(read_metrics(it.run_dir / "metrics.jsonl"))[-1]["step"] == 2
    sys.stdout.write(
        f"out of memory: told after {it.named_seconds:.1f} s, all ranks gone after "
        f"{it.gone_seconds:.1f} s\n"
    )
    assert it.gone_seconds < 10
