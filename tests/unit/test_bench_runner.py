"""Cases in turn, each in processes of its own: what is made of how they end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from dtune_launch.spec import JobSpec

from dtune.bench import runner
from dtune.bench.cases import Case, plan_cases
from dtune.bench.files import Failure, first_failure, read_case, write_failure
from dtune.bench.record import CaseResult, Status, read_jsonl, write_jsonl
from dtune.bench.runner import Ended, exit_code_of, run_cases
from dtune.errors import ConfigError
from tests.unit.bench_results import measured, result, without_numbers

KILLED = Ended(137, timed_out=False, stopped=False)
DONE = Ended(0, timed_out=False, stopped=False)


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    return plan_cases(["peft=lora,full", "bench.repeats=2", f"bench.out={tmp_path}/out", "-m"])


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


def test_a_folder_with_results_is_left_alone(run) -> None:
    run(give_result)
    with pytest.raises(ConfigError, match="holds results already"):
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
