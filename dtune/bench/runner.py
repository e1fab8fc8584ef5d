"""Runs cases one after another, each in processes of its own, and keeps what they came to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dtune_launch.local import exit_code, forwarding_signals, kill_tree, start_job
from dtune_launch.spec import JobSpec

from dtune.bench.cases import Case
from dtune.bench.files import (
    RESULT,
    CaseFile,
    Failure,
    first_failure,
    read_origin,
    write_case,
)
from dtune.bench.record import CaseResult, Origin, Status, read_jsonl, write_jsonl
from dtune.bench.score import score_case
from dtune.bench.table import line_of
from dtune.errors import ConfigError

RESULTS = "results.jsonl"
_POLL_SECONDS = 0.1
_LAST_LINES = 3
_KILLED_RANK = "Signal 9 (SIGKILL)"
"""What torchrun says of a rank that was killed; its own exit code is 1."""


@dataclass(frozen=True)
class Ended:
    """How the processes of a case ended."""

    code: int
    timed_out: bool
    stopped: bool
    """By a signal to the process that started them."""


def run_cases(cases: Sequence[Case], out: Path, command: Sequence[str]) -> list[CaseResult]:
    """Run every case as often as asked, all in turn; a line on the terminal as each ends.

    Results are appended to ``OUT/results.jsonl`` one by one. A case that fails stops no other; a
    signal stops the rest.

    Raises:
        ConfigError: The folder holds a bench already, or cannot be written.
    """
    path = out / RESULTS
    if path.exists() or any(out.glob("cases/*/repeat-*")):
        raise ConfigError(f"bench.out={out} holds a bench already; name another folder")
    results: list[CaseResult] = []
    for repeat in range(max(case.bench.repeats for case in cases)):
        for index, case in enumerate(cases):
            if repeat >= case.bench.repeats:
                continue
            folder = out / "cases" / str(index) / f"repeat-{repeat}"
            _start_folder(case, folder, repeat, command)
            ended = run_processes(
                JobSpec("dtune.bench.worker", (str(folder),), folder, case.nproc),
                folder / "case.log",
                max_minutes=case.bench.max_minutes,
            )
            if ended.stopped:
                return results
            result = _result_of(case, folder, repeat, command, ended)
            stopped = False
            if repeat == 0 and case.bench.train_steps and result.status is Status.ok:
                result, stopped = _with_score(result, case, folder.parent / "train", command)
            write_jsonl([result], path, append=True)
            results.append(result)
            say(f"[{len(results)}] {line_of(result)}")
            if stopped:
                return results
    return results


def _start_folder(case: Case, folder: Path, repeat: int, command: Sequence[str]) -> None:
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(case.text_in(folder), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"bench.out: {folder} cannot be written: {error.strerror}") from error
    write_case(folder, CaseFile(case.label, repeat, tuple(command), case.settings, case.bench))


def run_processes(job: JobSpec, log: Path, *, max_minutes: float) -> Ended:
    """Start a job, its output in ``log``, and wait for its end; it is killed after so long."""
    processes: list[subprocess.Popen[bytes]] = []
    began = time.monotonic()
    timed_out = False
    with open(log, "wb") as output, forwarding_signals(processes) as received:
        processes.append(start_job(job, output))
        while processes[0].poll() is None:
            time.sleep(_POLL_SECONDS)
            if max_minutes and time.monotonic() - began > 60 * max_minutes:
                timed_out = True
                kill_tree(processes[0].pid)
        return Ended(exit_code(processes[0].returncode), timed_out, bool(received))


def _result_of(
    case: Case, folder: Path, repeat: int, command: Sequence[str], ended: Ended
) -> CaseResult:
    if not ended.timed_out and ended.code == 0 and (folder / RESULT).is_file():
        (result,) = read_jsonl(folder / RESULT)
        return result
    failure = _failure_of(case, folder, ended)
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    # Nothing is known of versions and devices where no process could say it.
    origin = read_origin(folder) or Origin(tuple(command), now, "", {}, {})
    return CaseResult(
        framework="dtune",
        case=case.label,
        settings=case.settings,
        status=failure.status,
        origin=origin,
        reason=failure.reason,
        repeat=repeat,
        notes=(f"log: {folder.relative_to(folder.parents[2]) / 'case.log'}",),
    )


def _failure_of(case: Case, folder: Path, ended: Ended) -> Failure:
    now = time.time()
    if ended.timed_out:
        return Failure(Status.failed, _limit(case), now)
    said = first_failure(folder)
    if said is not None and said.status is Status.oom:
        return said
    log = (folder / "case.log").read_text(encoding="utf-8", errors="replace")
    if ended.code == 128 + signal.SIGKILL or _KILLED_RANK in log:
        # The kernel gives no other sign of it; other ranks have only lost that one.
        return Failure(
            Status.oom, "killed by SIGKILL, as Linux does where the host's memory is used up", now
        )
    if said is not None:
        return said
    last = " | ".join(log.strip().splitlines()[-_LAST_LINES:])
    return Failure(Status.failed, f"exit code {ended.code}: {last}", now)


def _limit(case: Case) -> str:
    return f"killed after bench.max_minutes={case.bench.max_minutes:g}"


def _with_score(
    result: CaseResult, case: Case, folder: Path, command: Sequence[str]
) -> tuple[CaseResult, bool]:
    """The result with what the method learns, or a note why its training failed.

    And whether a signal has stopped that.
    """
    say(f"    {case.label}: training {case.bench.train_steps} steps on {case.run.data.path}")
    ends: list[Ended] = []

    def run_it(job: JobSpec) -> int:
        log = folder / "logs" / "train.log"
        ends.append(run_processes(job, log, max_minutes=case.bench.max_minutes))
        return ends[-1].code

    score, why_not = score_case(case, folder, command, run_it)
    if score is not None:
        return replace(result, score=score), False
    if ends[-1].timed_out:
        why_not = _limit(case)
    return replace(result, notes=(*result.notes, f"not scored: {why_not}")), ends[-1].stopped


def exit_code_of(results: Sequence[CaseResult], wanted: int) -> int:
    """0 where every case gave a number or ran out of memory, and every asked score is there."""
    bad = [one for one in results if one.status in (Status.failed, Status.refused)]
    unscored = [one for one in results if any(note.startswith("not scored") for note in one.notes)]
    measured = any(one.status is Status.ok for one in results)
    return int(bool(bad or unscored) or not measured or len(results) < wanted)


def say(text: str) -> None:
    """A line on the terminal, at once."""
    sys.stdout.write(text + os.linesep)
    sys.stdout.flush()
