"""The soak's own checks: each notices what it is there for, and is silent where all is well."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.soak import course
from tests.soak.chaos import KINDS, Scene
from tests.soak.course import Course, Due, Endurance, Endured, Whole
from tests.soak.leaks import GROWTH, OpenFiles, count_open
from tests.soak.report import write_report
from tests.soak.run import Options, Soak, steps_gone_on_from

WHOLE = Whole("state", "weights", [{"step": 1}], 1.0)


@pytest.fixture
def endurance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Endurance:
    """Of a run that has ended as the one that was left alone."""
    monkeypatch.setattr(course, "state_digest", lambda run_dir: WHOLE.digest)
    monkeypatch.setattr(course, "exported", lambda run_dir: WHOLE.exported)
    monkeypatch.setattr(course, "numbers", lambda run_dir: list(WHOLE.rows))
    monkeypatch.setattr(course, "ORPHAN_SECONDS", 0.2)
    made = Endurance(Course("none", 1, ()), tmp_path, whole=WHOLE, seed=os.getpid(), room=None)
    made.run_dir.mkdir()
    return made


def problems(endurance: Endurance) -> list[str]:
    """What is wrong at the end."""
    endurance._check_end()
    return endurance.result.problems


def say(endurance: Endurance, *lines: str) -> None:
    """What the run says next."""
    with endurance.log.open("a") as file:
        file.write("".join(f"{line}\n" for line in lines))


def test_a_run_that_lost_nothing_has_no_problem(endurance: Endurance) -> None:
    endurance._floor = 10
    say(endurance, "going on from /run/checkpoints/step-00000010", "step 11/40 | loss 1")
    endurance._look()
    endurance._check_code(0)
    assert problems(endurance) == []
    assert (endurance.result.attempts, endurance.result.checkpoints_lost) == (1, 0)


def test_a_checkpoint_that_was_whole_and_is_not_gone_on_from_is_lost(endurance: Endurance) -> None:
    endurance._floor = 10
    say(endurance, "going on from /run/checkpoints/step-00000005")
    endurance._look()
    assert endurance.result.checkpoints_lost == 1
    assert problems(endurance) == ["went on from step 5, and 10 was whole"]


@pytest.fixture
def orphan(endurance: Endurance) -> Iterator[int]:
    """A process that the run has started and left."""
    name, _, value = endurance.mark.partition("=")
    process = subprocess.Popen(["sleep", "60"], env={**os.environ, name: value})
    yield process.pid
    process.kill()
    process.wait()


def test_a_process_that_is_left_is_told(endurance: Endurance, orphan: int) -> None:
    assert problems(endurance) == [f"processes left: [{orphan}]"]


def test_a_leak_is_a_problem(endurance: Endurance) -> None:
    for look in range(30):
        endurance._files.note({("rank 0", 7): 40 + look, ("agent", 3): 20})
    (problem,) = problems(endurance)
    assert problem == "rank 0 (process 7) leaks open files: from 40 to 60 in 30 looks"
    assert endurance._files.span() == {"rank 0": [40, 69], "agent": [20, 20]}


def test_files_that_are_open_for_a_moment_or_in_a_new_process_are_no_leak() -> None:
    files = OpenFiles()
    for look in range(30):
        files.note({("rank 0", 7): 40 + 50 * (look % 2), ("agent", 3): 20 + min(look, GROWTH)})
    for _ in range(30):
        files.note({("rank 0", 8): 70})
    assert files.leaks() == []
    # Seen too seldom to tell.
    files.note({("rank 1", 9): 1})
    files.note({("rank 1", 9): 1000})
    assert files.leaks() == []


def test_open_files_of_a_rank_are_counted(tmp_path: Path) -> None:
    program = "import sys; files = [open('/dev/null') for _ in range(50)]; input()"
    command = [sys.executable, "-c", program, "dtune.worker", str(tmp_path)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "RANK": "1"}
    )
    try:
        deadline = 200
        while (counted := count_open(tmp_path)).get(("rank 1", process.pid), 0) < 50 and deadline:
            deadline -= 1
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.1)
        assert list(counted) == [("rank 1", process.pid)]
        assert 50 <= counted["rank 1", process.pid] < 70
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("state_digest", "other", "the state is not"),
        ("exported", "other", "the weights are not"),
        ("numbers", [], "the metrics are not"),
        ("leftovers", [".tmp-1"], "left: ['.tmp-1']"),
    ],
)
def test_an_end_that_differs_is_told(
    endurance: Endurance, monkeypatch: pytest.MonkeyPatch, name: str, value: object, said: str
) -> None:
    monkeypatch.setattr(course, name, lambda run_dir: value)
    (problem,) = problems(endurance)
    assert problem.startswith(said)


@pytest.mark.parametrize(("code", "is_told"), [(0, False), (75, False), (1, True), (-9, True)])
def test_an_exit_code_that_no_fault_explains_is_told(
    endurance: Endurance, code: int, is_told: bool
) -> None:
    say(endurance, "what it said last")
    endurance._allowed = {75}
    endurance._check_code(code)
    assert bool(endurance.result.problems) is is_told


# As `dtune` says it.
HUNG = (
    "dtune: hung: no sign of life for 21 s, time-out 20 s (watch.step). rank 1 (here, process 7) "
    "hangs in step 8, forward pass, silent for 21 s: it is stopped by a signal. waiting: rank 0 "
    "in step 8, backward pass"
)


@pytest.mark.parametrize(("rank", "is_told"), [(1, False), (0, True), (11, True)])
def test_a_rank_that_hangs_has_to_be_named(endurance: Endurance, rank: int, is_told: bool) -> None:
    endurance._check_named(rank, HUNG.encode())
    assert endurance.result.problems == [f"rank {rank} hung and was not named"] * is_told


def test_a_strike_stops_one_rank_for_good_and_asks_who_is_blamed(
    endurance: Endurance, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(scene: Scene) -> set[int]:
        scene.hung = 1
        return set()

    say(endurance, HUNG)
    monkeypatch.setitem(KINDS, "a rank stopped for good", hang)
    monkeypatch.setattr(course, "wait_for_step", lambda scene: False)
    due = Due(0.0, "a rank stopped for good")
    with subprocess.Popen(["sleep", "60"]) as process:
        scene = Scene(endurance.run_dir, process, endurance.chance, None)
        # A run that does not step any more cannot hang.
        endurance._strike(due, scene)
        assert endurance.result.faults == []
        monkeypatch.setattr(course, "wait_for_step", lambda scene: True)
        endurance._strike(due, scene)
        process.kill()
    # What was said before does not count.
    assert endurance.result.problems == ["rank 1 hung and was not named"]
    assert endurance.result.faults[0]["ended"] >= 0


class Steps:
    """A run that writes a row whenever it is looked at, and then ends."""

    def __init__(self, rows: Path, looks: int) -> None:
        self.rows, self.looks, self.pid = rows, looks, os.getpid()

    def poll(self) -> int | None:
        self.looks -= 1
        with self.rows.open("a") as file:
            file.write("{}\n")
        return 0 if self.looks < 0 else None


@pytest.mark.parametrize(("looks", "there"), [(1000, True), (0, False)])
def test_a_fault_that_waits_for_a_step_comes_after_it_or_not_at_all(
    endurance: Endurance, looks: int, there: bool
) -> None:
    process: Any = Steps(endurance.run_dir / "metrics.jsonl", looks)
    scene = Scene(endurance.run_dir, process, endurance.chance, None)
    assert endurance._is_there(Due(0.0, "kill -9 of the tree", 0.05), scene) is there
    assert endurance._is_there(Due(0.0, "kill -9 of the tree"), scene)


@pytest.mark.parametrize(("kills", "lost", "ok"), [(2, 0, True), (1, 0, False), (2, 1, False)])
def test_a_soak_is_well_where_every_kill_came_and_nothing_is_lost(
    tmp_path: Path, kills: int, lost: int, ok: bool
) -> None:
    options = Options(kills=2, out=str(tmp_path / "s.json"), page=str(tmp_path / "s.md"))
    leg = Endured("none", checkpoints_lost=lost, problems=["lost"] * lost)
    soak = Soak(options, tmp_path, None, legs=[leg], clean_restarts=[True], kills=kills)
    assert write_report(soak, started=0.0, loads=[0.0, 0.0]) is ok
    assert f"Kills at random: {kills} of 2" in (tmp_path / "s.md").read_text()


def test_what_each_attempt_went_on_from_is_read_from_what_was_said() -> None:
    end = b"attempt ended: rank 0 of this machine exited with 1\n"
    went_on = b"going on from /run/checkpoints/step-00000005\n"
    assert steps_gone_on_from(b"step 1\n" + end + b"step 1\n" + end + went_on) == [-1, 5]
