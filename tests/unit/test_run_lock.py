"""Two runs in one folder: the second is refused, and what a dead one has left is taken over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from dtune.errors import ConfigError
from dtune.runtime import lock
from dtune.runtime.files import TEMPORARY
from dtune.runtime.lock import LOCK, STALE_SECONDS, check_free, check_held, holding
from dtune.runtime.processes import Holder, this_process

ROOT = Path(__file__).parents[2]

HOLD = """
import sys, time
from pathlib import Path
from dtune.runtime.lock import holding
with holding(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def another_process(folder: Path, code: str = HOLD, **environment: str) -> Iterator[Popen]:
    """A process that holds the folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


Popen = subprocess.Popen[str]


def kill(process: Popen) -> None:
    process.kill()
    process.wait()


def leave(folder: Path, holder: Holder) -> None:
    """A lock as a holder that is no more has left it."""
    folder.mkdir(exist_ok=True)
    record = {"token": "dead", "holders": [asdict(holder)]}
    (folder / LOCK).write_text(json.dumps(record))


def lock_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if LOCK in path.name)


def can_be_held(folder: Path) -> bool:
    try:
        with holding(folder):
            return True
    except ConfigError:
        return False


def test_the_second_of_two_runs_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    with another_process(tmp_path, SLURM_JOB_ID="1234") as first:
        with pytest.raises(ConfigError) as refused, holding(tmp_path):
            pass
        holder = this_process()
        for part in (str(tmp_path), f"process {first.pid} on {holder.host} of job 1234, since 20"):
            assert part in str(refused.value)
        with pytest.raises(ConfigError, match=f"in use by process {first.pid}"):
            check_free(tmp_path)
        assert f"process {first.pid}" in check_held(tmp_path)
        first.communicate("\n")
    assert lock_files(tmp_path) == []
    check_free(tmp_path)
    assert check_held(tmp_path) == ""
    assert can_be_held(tmp_path)


def test_a_refused_run_waits_as_long_as_it_is_told_to(tmp_path: Path) -> None:
    with another_process(tmp_path) as first:
        began = time.monotonic()
        with pytest.raises(ConfigError), holding(tmp_path, patience=0.5):
            pass
        assert time.monotonic() - began >= 0.5
        assert first.stdin is not None
        first.stdin.write("\n")
        first.stdin.flush()
        with holding(tmp_path, patience=60):
            assert lock_files(tmp_path) == [LOCK]


def test_what_a_killed_process_has_left_is_taken_over_with_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with another_process(tmp_path) as first:
        kill(first)
        assert lock_files(tmp_path) == [LOCK]
        assert check_held(tmp_path) == ""
        with holding(tmp_path):
            assert f"left by process {first.pid} on" in capfd.readouterr().err
            assert lock_files(tmp_path) == [LOCK]
    assert lock_files(tmp_path) == []


def test_another_process_with_the_number_of_a_dead_one_does_not_hold(tmp_path: Path) -> None:
    parent = replace(this_process(), pid=os.getppid(), born=1)
    leave(tmp_path, parent)
    assert can_be_held(tmp_path)


@pytest.mark.parametrize("killed", ["launcher", "rank"])
def test_a_launcher_and_its_rank_hold_together(tmp_path: Path, killed: str) -> None:
    """As `dtune train` and rank 0 do; whichever is killed, the other holds on."""
    code = f"""
import subprocess, sys
from pathlib import Path
from dtune.runtime.lock import holding
with holding(Path(sys.argv[1])):
    rank = subprocess.Popen([sys.executable, "-c", {HOLD!r}, sys.argv[1]],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert rank.stdout.readline() == "held\\n"
    print("held", flush=True)
    print(rank.pid, flush=True)
    sys.stdin.readline()
"""
    with another_process(tmp_path, code) as launcher:
        assert launcher.stdout is not None
        rank = int(launcher.stdout.readline())
        both = {holder["pid"] for holder in json.loads((tmp_path / LOCK).read_text())["holders"]}
        assert both == {launcher.pid, rank}
        descriptor = os.pidfd_open(rank)
        try:
            if killed == "launcher":
                # Its pipe ends with it, so the rank is stopped before it can end as well.
                os.kill(rank, signal.SIGSTOP)
                kill(launcher)
            else:
                os.kill(rank, signal.SIGKILL)
            assert not can_be_held(tmp_path)
        finally:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)
        if killed == "rank":
            assert not can_be_held(tmp_path)
            kill(launcher)
        # Nobody here waits for the rank, which ends a moment after it was killed.
        wait_until(lambda: can_be_held(tmp_path))


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


ELSEWHERE = Holder("node7", "another boot", 4242, 1, "2026-01-01 00:00:00")


def test_a_rank_joins_what_the_launcher_of_its_run_holds_on_another_host(tmp_path: Path) -> None:
    leave(tmp_path, ELSEWHERE)
    with holding(tmp_path, joins=True):
        held = json.loads((tmp_path / LOCK).read_text())["holders"]
        assert [holder["pid"] for holder in held] == [ELSEWHERE.pid, os.getpid()]
    with pytest.raises(ConfigError, match="process 4242 on node7"), holding(tmp_path):
        pass


def test_a_holder_on_another_host_counts_as_long_as_it_is_heard_of(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, ELSEWHERE)
    with pytest.raises(ConfigError, match="process 4242 on node7"), holding(tmp_path):
        pass
    heard = time.time() - STALE_SECONDS + 30
    os.utime(tmp_path / LOCK, (heard, heard))
    assert not can_be_held(tmp_path)
    heard = time.time() - STALE_SECONDS - 30
    os.utime(tmp_path / LOCK, (heard, heard))
    assert can_be_held(tmp_path)
    assert "left by process 4242 on node7" in capfd.readouterr().err


def test_the_clock_of_this_host_does_not_make_a_lock_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(tmp_path, ELSEWHERE)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 10 * STALE_SECONDS)
    assert not can_be_held(tmp_path)


def test_a_holder_is_heard_of_while_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    with holding(tmp_path):
        os.utime(tmp_path / LOCK, (1, 1))
        wait_until(lambda: (tmp_path / LOCK).stat().st_mtime > 1)


@pytest.mark.parametrize(
    ("answer", "held"),
    [
        ("echo RUNNING", True),
        ("echo COMPLETING", True),
        ("echo TIMEOUT", False),
        ("exit 0", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", True),
    ],
)
def test_a_job_that_slurm_knows_no_more_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, held: bool
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "squeue").write_text(f"#!/bin/sh\n{answer}\n")
    (programs / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    leave(tmp_path, replace(ELSEWHERE, job="1234"))
    assert can_be_held(tmp_path) is not held


@pytest.mark.parametrize(
    ("variables", "held"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, False),
        ({"SLURM_JOB_ID": "7", "TORCHELASTIC_RESTART_COUNT": "1"}, False),
        ({"SLURM_JOB_ID": "7"}, True),
        ({"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, True),
        ({}, True),
    ],
)
def test_a_job_that_is_started_again_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], held: bool
) -> None:
    """Even on another host, where nobody can ask whether the ranks of before are gone."""
    # SLURM, where it runs here, knows nothing of these jobs.
    monkeypatch.setenv("PATH", "")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    leave(tmp_path, replace(ELSEWHERE, job="7"))
    assert can_be_held(tmp_path) is not held


def test_within_a_process_it_is_held_once(tmp_path: Path) -> None:
    with holding(tmp_path):
        with holding(tmp_path):
            assert lock_files(tmp_path) == [LOCK]
        check_free(tmp_path)
        assert lock_files(tmp_path) == [LOCK]
    assert lock_files(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": 1}', '{"token": "a", "holders": [1]}'])
def test_a_lock_that_says_nothing_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(lock, "_UNWRITTEN_SECONDS", 0.1)
    (tmp_path / LOCK).write_text(text)
    assert can_be_held(tmp_path)
    assert lock_files(tmp_path) == []


def test_without_hard_links_it_still_has_one_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*paths: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with another_process(tmp_path) as first:
        assert not can_be_held(tmp_path)
        kill(first)
        assert can_be_held(tmp_path)


def test_a_folder_that_takes_no_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match="file/run cannot be written: Not a directory"),
        holding(tmp_path / "file" / "run"),
    ):
        pass


def test_what_is_left_of_killed_processes_goes_with_time(tmp_path: Path) -> None:
    for name in (f"{TEMPORARY}{LOCK}-1234", f"{LOCK}.5678"):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / f"{TEMPORARY}{LOCK}-new").write_text("")
    assert can_be_held(tmp_path)
    assert lock_files(tmp_path) == [f"{TEMPORARY}{LOCK}-new"]
