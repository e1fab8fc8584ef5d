"""Ranks that hang, each in its own way: named by their watchers, and ended."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from dtune.runtime.status import State, Status, read_status, write_status
from dtune.runtime.watch.judge import OTHERS_SECONDS
from dtune.runtime.watch.watcher import SUSPENDED_SECONDS
from tests.faults.injection import family
from tests.faults.watched_rank import STEP_SECONDS

LATEST = STEP_SECONDS + 10.0
CASES = {
    "stop": "stop,1,3",
    "stop_first": "stop,0,3",
    "sleep": "sleep,1,3",
    "gil": "gil,1,3",
    "cured": "cured,1,3",
    "suspended": "suspended,1,3",
    "batch": "batch,1,3",
    "unequal": "unequal,1,3",
    "kill": "kill,1,3",
    "fail": "fail,1,3",
    "none": "none,0,0",
    "start": "start,1,0",
    "evaluation": "evaluation,1,2",
    "save": "save,1,2",
    "slow": "slow,1,0",
}
GUILTY = {name: int(fault.split(",")[1]) for name, fault in CASES.items()}
NO_HANG = ("kill", "fail", "none", "cured", "suspended", "start", "slow")
HUNG = [name for name in CASES if name not in NO_HANG]
SECTIONS = ("save", "evaluation")
SAYS = {
    "stop": "stopped by a signal",
    "stop_first": "stopped by a signal",
    "sleep": "has not begun a collective call that others wait in",
    "gil": "its lock is held",
    "batch": "waiting for its next batch",
    "unequal": "others are in step 4 already",
    "evaluation": "hangs in evaluation after step 2",
    "save": "hangs in save after step 2",
}


@dataclass(frozen=True)
class Ended:
    """How the ranks of a case ended."""

    run_dir: Path
    status: Status
    codes: list[int]
    said: str
    last_call: float
    """When the step before the fault was over, since the epoch."""
    all_ended: float


def last_call(run_dir: Path) -> float:
    # A rank that was stopped goes on for the moment in which it shows its stacks.
    at = 4 if run_dir.name in ("unequal", "none", "cured", "suspended", "slow") else 2
    before = "started-*" if run_dir.name == "start" else f"call-*-{at}"
    return max(path.stat().st_mtime for path in run_dir.glob(before))


def suspend(run_dir: Path, ranks: list[int]) -> None:
    """Stop ranks and watchers for longer than a step may take, once one is in the step."""
    deadline = time.monotonic() + 120
    while not (run_dir / "is-quiet").is_file():
        if time.monotonic() > deadline:
            return  # The ranks never came to it: the test of this case says so.
        time.sleep(0.01)
    processes = [pid for rank in ranks for pid in family(rank)]
    assert len(processes) == 4
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(SUSPENDED_SECONDS + 2.0)
    for pid in processes:
        os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """All cases side by side."""
    folder = tmp_path_factory.mktemp("watchers")
    running: dict[str, list[subprocess.Popen[str]]] = {}
    for name, fault in CASES.items():
        (folder / name).mkdir()
        write_status(folder / name, Status(State.running))
        arguments = (str(folder / name), "2")
        running[name] = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.faults.watched_rank", *arguments, str(rank), fault],
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
    ends: dict[str, float] = {}
    deadline = time.monotonic() + 240
    suspended = threading.Thread(
        target=suspend, args=(folder / "suspended", [it.pid for it in running["suspended"]])
    )
    suspended.start()
    try:
        while len(ends) < len(running) and time.monotonic() < deadline:
            time.sleep(0.02)
            for name, processes in running.items():
                if name not in ends and all(process.poll() is not None for process in processes):
                    ends[name] = time.time()
    finally:
        suspended.join()
        for process in itertools.chain(*running.values()):
            process.kill()
    results = {}
    for name, processes in running.items():
        said = "".join(process.communicate()[1] for process in processes)
        assert name in ends, f"{name}: {said}"
        results[name] = Ended(
            folder / name,
            read_status(folder / name),
            [process.returncode for process in processes],
            said,
            last_call(folder / name),
            ends[name],
        )
    return results


@pytest.mark.parametrize("name", HUNG)
def test_a_rank_that_hangs_is_named_in_time(ended: dict[str, Ended], name: str) -> None:
    it = ended[name]
    assert (it.status.state, it.status.rank) == (State.hung, GUILTY[name]), it.status
    assert it.status.section == {"unequal": "save"}.get(name, name if name in SECTIONS else "step")
    assert SAYS[name] in it.status.message
    assert it.status.message in it.said
    assert it.status.time - it.last_call < LATEST


@pytest.mark.parametrize("name", HUNG)
def test_all_ranks_of_a_run_that_hangs_end_in_seconds(ended: dict[str, Ended], name: str) -> None:
    it = ended[name]
    assert it.all_ended - it.status.time < 10
    # A rank that cannot end itself is killed; one that was stopped may have a moment for it.
    stuck = {"stop": 1, "stop_first": 0, "gil": 1}.get(name)
    assert all(code == 1 or (rank == stuck and code == -9) for rank, code in enumerate(it.codes))
    assert name != "gil" or it.codes[1] == -9


@pytest.mark.parametrize("name", HUNG)
def test_stacks_of_all_ranks_say_where_they_are(ended: dict[str, Ended], name: str) -> None:
    stacks = [
        (ended[name].run_dir / "logs" / f"stacks-rank-{rank}.txt").read_text() for rank in (0, 1)
    ]
    assert all("State:" in text and "MainThread" not in text for text in stacks)
    where = {"batch": "wait_for_a_batch", "unequal": "wait_for"}.get(name, "watched_rank.py")
    assert where in stacks[GUILTY[name]]
    assert "wait_for" in stacks[1 - GUILTY[name]]


def test_a_rank_that_hangs_before_all_have_met_is_named_by_its_own_watcher(
    ended: dict[str, Ended],
) -> None:
    it = ended["start"]
    assert (it.status.state, it.status.rank, it.status.section) == (State.hung, 1, "start")
    assert "(watch.start)" in it.status.message
    assert "in sleep_for_ever" in it.status.message
    assert "The ranks of the run had not met yet" in it.status.message
    # The other one has waited for it, and ends as well.
    assert "rank 0 in the start, waiting for the other ranks to come" in it.said
    assert it.codes == [1, 1]
    assert it.all_ended - it.last_call < LATEST + OTHERS_SECONDS + 10


def test_a_slow_rank_is_reported_and_goes_on(ended: dict[str, Ended]) -> None:
    it = ended["slow"]
    assert (it.codes, it.status.state) == ([0, 0], State.running)
    log = (it.run_dir / "logs" / "watch.log").read_text()
    assert log.count("is slow") == 1
    assert "dtune: rank 1 (" in log
    assert "times as long as the middle rank" in log


def test_a_rank_that_is_killed_ends_the_others_at_once(ended: dict[str, Ended]) -> None:
    it = ended["kill"]
    assert (it.status.state, it.status.rank) == (State.failed, 1)
    assert "ended without a word in step 3" in it.status.message
    assert it.codes == [1, -9]
    assert it.all_ended - it.last_call < 10


def test_a_rank_that_fails_ends_the_others_and_is_shown_first(ended: dict[str, Ended]) -> None:
    it = ended["fail"]
    assert (it.status.state, it.status.rank) == (State.failed, 1)
    assert it.said.startswith("dtune: a rank fails\nTraceback: here")
    assert it.codes == [1, 1]
    assert it.all_ended - it.last_call < 15


def test_a_rank_that_goes_on_when_its_stacks_are_taken_is_left_alone(
    ended: dict[str, Ended],
) -> None:
    it = ended["cured"]
    assert (it.codes, it.status.state) == ([0, 0], State.running)
    assert "goes on, now that its stacks were taken" in it.said


def test_time_in_which_a_whole_run_was_suspended_is_forgiven(ended: dict[str, Ended]) -> None:
    it = ended["suspended"]
    assert STEP_SECONDS < SUSPENDED_SECONDS
    assert (it.codes, it.said, it.status.state) == ([0, 0], "", State.running)


def test_a_run_in_which_nothing_hangs_is_left_alone(ended: dict[str, Ended]) -> None:
    it = ended["none"]
    assert (it.codes, it.said, it.status.state) == ([0, 0], "", State.running)
