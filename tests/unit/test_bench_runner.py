"""Cases in turn, each in processes of its own: what is made of how they end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from dtune_launch.spec import JobSpec

from dtune.bench import runner
from dtune.bench.cases import Case, plan_cases
from dtune.bench.files import Failure, first_failure, read_case, write_failure, write_origin
from dtune.bench.record import CaseResult, Status, read_jsonl, write_jsonl
from dtune.bench.runner import Ended, exit_code_of, run_cases
from dtune.errors import ConfigError
from dtune.runtime.status import State, write_status
from dtune.runtime.status import Status as RunStatus
from tests.unit.bench_results import measured, result, without_numbers

KILLED = Ended(137, timed_out=False, stopped=False)
DONE = Ended(0, timed_out=False, stopped=False)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    out = tmp_path_factory.mktemp("bench")
    return plan_cases(["peft=lora,full", "bench.repeats=2", f"bench.out={out}", "-m"])


def give_result(folder: Path) -> Ended:
    """What a worker does that has measured."""
    case = read_case(folder)
    write_jsonl(
        [result(case.label, measured(), settings=case.settings, repeat=case.repeat)],
        folder / "result.jsonl",
    )
    return DONE


@pytest.fixture
def run(cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the cases with processes that are none; what became of them, and who was started."""

    def with_processes(end: Callable[[Path], Ended]) -> tuple[list[CaseResult], list[str]]:
        started: list[str] = []

        def instead(job: JobSpec, log: Path, *, max_minutes: float) -> Ended:
            log.touch()
            case = read_case(job.run_dir)
            started.append(f"{case.label} {case.repeat}")
            return end(job.run_dir)

        monkeypatch.setattr(runner, "run_processes", instead)
        return run_cases(cases, tmp_path / "out", ["dtune", "bench"]), started

    return with_processes


def test_cases_take_turns(run, tmp_path: Path) -> None:
    results, started = run(give_result)
    assert started == ["peft=lora 0", "peft=full 0", "peft=lora 1", "peft=full 1"]
    assert [one.repeat for one in results] == [0, 0, 1, 1]
    assert read_jsonl(tmp_path / "out" / "results.jsonl") == results
    assert exit_code_of(results, 4) == 0


def test_a_process_that_linux_has_killed_was_out_of_memory_and_the_rest_goes_on(run) -> None:
    results, started = run(lambda f: KILLED if "cases/0" in str(f) else give_result(f))
    assert len(started) == 4
    assert [one.status.value for one in results] == ["oom", "ok", "oom", "ok"]
    assert "SIGKILL" in results[0].reason
    assert exit_code_of(results, 4) == 0


def test_what_a_rank_says_of_its_end_is_the_reason(run) -> None:
    def fail(folder: Path) -> Ended:
        write_failure(folder, Failure(Status.failed, "ValueError: no", 5.0))
        return replace(DONE, code=1)

    results, _ = run(fail)
    assert {(one.status, one.reason) for one in results} == {(Status.failed, "ValueError: no")}
    assert exit_code_of(results, 4) == 1


def test_what_no_rank_has_said_is_taken_from_the_log(run) -> None:
    def fail(folder: Path) -> Ended:
        (folder / "case.log").write_text("one\ntwo\nthree\nfour\n")
        return replace(DONE, code=1)

    results, _ = run(fail)
    assert results[0].reason == "exit code 1: two | three | four"


def test_a_signal_ends_the_bench_and_what_was_measured_stays(run) -> None:
    ended = iter([give_result, lambda folder: replace(DONE, stopped=True)])
    results, started = run(lambda folder: next(ended)(folder))
    assert len(started) == 2
    assert len(results) == 1
    assert exit_code_of(results, 4) == 1


def test_a_rank_that_linux_has_killed_is_out_of_memory_whatever_the_others_say(run) -> None:
    def killed(folder: Path) -> Ended:
        write_failure(folder, Failure(Status.failed, "RuntimeError: lost a peer", 5.0))
        (folder / "case.log").write_text("traceback : Signal 9 (SIGKILL) received by PID 77\n")
        return replace(DONE, code=1)

    results, _ = run(killed)
    assert {one.status for one in results} == {Status.oom}


def test_a_row_without_numbers_says_where_it_was_measured(run) -> None:
    def fail(folder: Path) -> Ended:
        write_origin(folder, result().origin)
        return KILLED

    results, _ = run(fail)
    assert results[0].origin == result().origin


def test_a_process_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    job = JobSpec("timeit", ("-n", "1", "import time; time.sleep(600)"), tmp_path, 1)
    ended = runner.run_processes(job, tmp_path / "log", max_minutes=0.5 / 60)
    assert (ended.code, ended.timed_out, ended.stopped) == (137, True, False)


def test_what_was_killed_for_its_time_says_so(run) -> None:
    results, _ = run(lambda folder: replace(KILLED, timed_out=True))
    assert {one.status for one in results} == {Status.failed}
    assert results[0].reason == "killed after bench.max_minutes=0"


def test_a_signal_while_a_method_is_trained_ends_the_bench_and_keeps_the_row(
    cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def instead(job: JobSpec, log: Path, *, max_minutes: float) -> Ended:
        log.touch()
        started.append(job.module)
        if job.module == "dtune.worker":
            write_status(job.run_dir, RunStatus(State.preempted, message="stopped by SIGTERM"))
            return replace(DONE, code=75, stopped=True)
        return give_result(job.run_dir)

    monkeypatch.setattr(runner, "run_processes", instead)
    scored = [replace(case, bench=replace(case.bench, train_steps=5)) for case in cases]
    (row,) = run_cases(scored, tmp_path / "out", ["dtune", "bench"])
    assert started == ["dtune.bench.worker", "dtune.worker"]
    assert row.measured is not None
    assert row.notes[-1] == "not scored: stopped by SIGTERM"
    assert exit_code_of([row], 4) == 1


def test_a_folder_with_a_bench_is_left_alone(run, tmp_path: Path) -> None:
    run(give_result)
    with pytest.raises(ConfigError, match="holds a bench already"):
        run(give_result)
    # Nor is one whose bench was stopped before its first result.
    (tmp_path / "out" / "results.jsonl").unlink()
    with pytest.raises(ConfigError, match="holds a bench already"):
        run(give_result)


def test_a_refused_case_and_no_numbers_at_all_are_a_failure() -> None:
    refused = without_numbers("peft=full", Status.refused, "it does not learn")
    oom = without_numbers("peft=full", Status.oom, "no room")
    assert exit_code_of([result(), oom], 2) == 0
    assert exit_code_of([result(), refused], 2) == 1
    assert exit_code_of([oom], 1) == 1
    assert exit_code_of([result(notes=("not scored: it diverged",))], 1) == 1


def test_of_several_ranks_the_one_out_of_memory_is_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert first_failure(tmp_path) is None
    ends = [
        (Status.failed, "lost a peer", 1.0),
        (Status.oom, "no room", 2.0),
        (Status.failed, "lost a peer", 0.5),
    ]
    for rank, (status, reason, time) in enumerate(ends):
        monkeypatch.setenv("RANK", str(rank))
        write_failure(tmp_path, Failure(status, reason, time))
    found = first_failure(tmp_path)
    assert found is not None
    assert found.reason == "no room"
