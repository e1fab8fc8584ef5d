"""dtune status, logs and cancel: on runs as their files and processes tell them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from dtune_launch.record import JobRecord, read_record, write_record

from dtune.cli import main
from dtune.commands import logs
from dtune.commands.running import last_rows, read_standing
from dtune.runtime.status import State, Status, write_status

# Holds the lock of the folder, and ends as a run does that is asked to save and stop.
HOLDER = """
import signal, sys, time
from pathlib import Path
from dtune.runtime.lock import holding
from dtune.runtime.status import State, Status, write_status
folder, stop = Path(sys.argv[1]), []
signal.signal(signal.SIGUSR1, lambda *_: stop.append(1))
with holding(folder):
    write_status(folder, Status(State.running))
    (folder / "logs").mkdir()
    (folder / "logs" / "rank-0.log").write_text("first line\\n")
    while not stop:
        time.sleep(0.02)
    with open(folder / "logs" / "rank-0.log", "a") as log:
        log.write("last line\\n")
    write_status(folder, Status(State.preempted, step=7))
"""

# Answers as Slurm's clients do, and keeps what it was asked.
CLIENT = """#!/bin/sh
echo "$(basename $0) $*" >>"{asked}"
case $(basename $0) in
  squeue) echo "{answer}" ;;
  scontrol) exit 1 ;;
esac
"""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    folder = tmp_path / "run"
    folder.mkdir()
    started = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)])
    deadline = time.monotonic() + 120
    while not (folder / "logs" / "rank-0.log").is_file():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield started
    started.kill()
    started.wait()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Clients of a cluster whose job 12_3 runs; what they were asked is in the file returned."""
    (tmp_path / "bin").mkdir()
    asked = tmp_path / "asked"
    for name in ("squeue", "scontrol", "scancel"):
        tool = tmp_path / "bin" / name
        tool.write_text(CLIENT.format(asked=asked, answer="RUNNING|n[1-2]|0:35|1:00:00"))
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    return asked


def make_run(folder: Path, state: State, **kwargs: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("run_dir: x\n")
    write_status(folder, Status(state, **kwargs))  # type: ignore[arg-type]
    return folder


def test_a_run_that_has_ended_is_told_with_its_numbers_and_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", State.diverged, step=3, rank=1, message="loss is NaN")
    rows = [
        {"kind": "train", "step": 2, "loss": 2.5, "lr": 1e-3},
        {"kind": "eval", "step": 2, "loss": 2.25, "exact_match": 0.5},
        {"kind": "train", "step": 3, "loss": None, "lr": 1e-3},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "metrics.jsonl").write_text(text + '{"kind": "train", "st')
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "LATEST").write_text("step-00000002\n")
    assert main(["status", str(run)]) == 0
    said = capsys.readouterr().out
    assert "diverged since" in said
    assert "rank 1: loss is NaN" in said
    assert "step 2, loss 2.2500, exact_match 50.0%" in said
    assert "newest     step-00000002" in said
    assert last_rows(run)["train"]["step"] == 3


def test_runs_of_a_folder_are_told_in_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, state in (("10", State.failed), ("9", State.done), ("0", State.running)):
        make_run(tmp_path / "sweep" / name, state)
    monkeypatch.chdir(tmp_path)
    assert main(["status", "sweep"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    # Nobody holds its lock: what runs by its status has been killed.
    expected = [["sweep/0", "killed"], ["sweep/9", "done"], ["sweep/10", "failed"]]
    assert [line.split()[:2] for line in lines] == expected


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["status", "nowhere"], "there is no such folder"),
        (["status", "."], "nor does it hold any"),
        (["status"], "required: RUN"),
        (["logs", "ended"], "has no log of rank 0 yet"),
        (["logs", "ended", "--rank", "-1"], "--rank is the number"),
        (["cancel", "ended"], "does not run: it is done"),
        (["cancel", "ended", "--nwo"], "unrecognized arguments: --nwo"),
    ],
)
def test_wrong_arguments_are_told(
    argv: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "ended" in argv:
        make_run(tmp_path / "ended", State.done)
    assert main(argv) == 2
    assert said in capsys.readouterr().err


def test_a_run_of_this_machine_is_followed_and_cancelled(
    process: subprocess.Popen[bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert read_standing(run).state == "running"
    assert main(["status", str(run)]) == 0
    assert f"process {process.pid} on" in capfd.readouterr().out
    with subprocess.Popen(
        [sys.executable, "-m", "dtune", "logs", "-f", f"run_dir={run}"], stdout=subprocess.PIPE
    ) as follower:
        assert follower.stdout is not None
        assert follower.stdout.readline() == b"first line\n"
        assert main(["cancel", str(run)]) == 0
        assert follower.stdout.read() == b"last line\n"
        assert follower.wait(timeout=120) == 0
    assert process.wait(timeout=120) == 0
    standing = read_standing(run)
    assert (standing.state, standing.status.step, standing.is_alive) == ("preempted", 7, False)


def test_now_does_not_wait_for_a_save(process: subprocess.Popen[bytes], tmp_path: Path) -> None:
    assert main(["cancel", "--now", str(tmp_path / "run")]) == 0
    assert process.wait(timeout=120) == -signal.SIGKILL
    assert read_standing(tmp_path / "run").state == "killed"


@pytest.mark.parametrize(
    ("more", "asked"),
    [([], "scancel --batch --signal=USR2 12_3"), (["--now"], "scancel 12_3")],
)
def test_a_job_is_told_and_cancelled_by_the_id_of_its_element_alone(
    more: list[str],
    asked: str,
    slurm: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run(tmp_path / "run", State.running)
    write_record(run, JobRecord("slurm", "12_3"))
    assert main(["status", str(run)]) == 0
    assert "job        12_3 RUNNING n[1-2] 0:35 of 1:00:00" in capsys.readouterr().out
    assert main(["cancel", str(run), *more]) == 0
    assert slurm.read_text().splitlines()[-1] == asked


def test_a_job_that_is_over_says_nothing_of_a_later_run_on_this_machine(
    process: subprocess.Popen[bytes],
    slurm: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    write_record(run, JobRecord("slurm", "12"))
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text(squeue.read_text().replace("RUNNING", "COMPLETED"))
    standing = read_standing(run)
    assert (standing.state, standing.job_state.split()[0]) == ("running", "COMPLETED")
    assert main(["cancel", str(run)]) == 0
    assert process.wait(timeout=120) == 0
    assert "scancel" not in slurm.read_text()
    # Nobody works there any more.
    write_status(run, Status(State.running))
    assert read_standing(run).state == "killed"


@pytest.mark.parametrize("damaged", ["", '{"state": "run', '{"state": "x"}', "[]", "{}"])
def test_a_status_that_cannot_be_read_is_told(
    damaged: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", State.running)
    (run / "status.json").write_text(damaged)
    assert main(["status", str(run)]) == 0
    said = capsys.readouterr().out
    assert "killed" in said
    assert f"message    {run / 'status.json'} cannot be read: " in said


def test_a_character_of_which_a_part_is_written_yet_is_printed_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", State.running)
    (run / "logs").mkdir()
    log, rest = run / "logs" / "rank-0.log", iter([b"\xaf", b"\x95\n", b"cut \xe6"])
    log.write_bytes("loss 1.0 好".encode() + b"\xe6")

    def write_more(seconds: float) -> None:
        with log.open("ab") as file:
            file.write(next(rest))

    standings = iter([True, True, True, False])
    stand_ins = {"is_alive": property(lambda self: next(standings))}
    standing = type("Standing", (), stand_ins)()
    monkeypatch.setattr(logs, "read_standing", lambda folder: standing)
    monkeypatch.setattr(logs, "_ASK_SECONDS", -1.0)
    monkeypatch.setattr(logs.time, "sleep", write_more)
    assert main(["logs", str(run), "-f"]) == 0
    assert capsys.readouterr().out == "loss 1.0 好毕\ncut \N{REPLACEMENT CHARACTER}"


def test_a_log_is_followed_without_asking_slurm_at_every_look(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", State.running)
    write_record(run, JobRecord("slurm", "12"))
    (run / "logs").mkdir()
    (run / "logs" / "rank-0.log").write_text("first line\n")
    looks = 40
    passed: list[float] = []

    def sleep(seconds: float) -> None:
        passed.append(seconds)
        if len(passed) == looks:
            write_status(run, Status(State.done))

    monkeypatch.setattr(logs, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: sum(passed)))
    assert main(["logs", "-f", str(run)]) == 0
    assert len(passed) in (looks, looks + 1)
    # At first, and each time that so many seconds have passed.
    assert len(slurm.read_text().splitlines()) == 1 + int(sum(passed) / logs._ASK_SECONDS)


def test_the_record_of_a_script_by_hand_is_read_like_that_of_dtune(tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text('{"launcher": "slurm", "job_id": "7", "time": 1}\n')
    assert read_record(tmp_path) == JobRecord("slurm", "7", time=1)
