"""``dtune bench compare``: worse beyond the noise fails, what cannot be compared is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dtune.bench.record import CaseResult, Status, write_jsonl
from dtune.cli import main
from tests.unit.bench_results import HARDWARE, VERSIONS, measured, result, without_numbers

# Half of p90 - p10 is 3.5 % of the median: 7 % for both files.
STEADY = (0.95, 1.0, 1.0, 1.05)


def times(seconds: tuple[float, ...], factor: float) -> tuple[float, ...]:
    return tuple(one * factor for one in seconds)


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def run(old: list[CaseResult], new: list[CaseResult], *flags: str) -> tuple[int, str]:
        files = [tmp_path / "old.jsonl", tmp_path / "new.jsonl"]
        for file, results in zip(files, (old, new), strict=True):
            write_jsonl(results, file)
        code = main(["bench", "compare", *map(str, files), *flags])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


def test_slower_beyond_the_noise_fails_and_within_it_does_not(compare) -> None:
    old = [result(numbers=measured(STEADY))]
    code, said = compare(old, [result(numbers=measured(times(STEADY, 1.10)))])
    assert code == 1
    assert "peft=lora  tokens/s" in said
    assert "WORSE" in said

    code, said = compare(old, [result(numbers=measured(times(STEADY, 1.02)))])
    assert (code, "WORSE" in said) == (0, False)

    code, said = compare(old, [result(numbers=measured(times(STEADY, 0.5)))])
    assert code == 0
    assert "better" in said


def test_the_spread_between_repeats_is_noise(compare) -> None:
    exact = (1.0, 1.0, 1.0)

    def runs(*factors: float) -> list[CaseResult]:
        return [
            result(numbers=measured(times(exact, factor)), repeat=repeat)
            for repeat, factor in enumerate(factors)
        ]

    old = runs(1.00, 1.02, 1.01)
    # Three runs each, which lie 1 % apart: 2.78 x 1 % x sqrt(2 / 3) = 2.3 %.
    assert compare(old, runs(1.02, 1.03, 1.04))[0] == 0
    assert compare(old, runs(1.03, 1.04, 1.05))[0] == 1
    # Two runs that agree say little of a third.
    assert compare(runs(1.0, 1.01), runs(1.03, 1.02))[0] == 0


def test_more_tensors_fail_even_where_libraries_hide_them(compare) -> None:
    old = [result(numbers=measured(counted_bytes=100_000_000))]
    code, said = compare(old, [result(numbers=measured(counted_bytes=110_000_000))])
    assert code == 1
    assert "tensors GiB" in said


def test_more_memory_fails(compare) -> None:
    old = [result(numbers=measured(peak_rss_bytes=2_000_000_000))]
    assert compare(old, [result(numbers=measured(peak_rss_bytes=2_010_000_000))])[0] == 0
    code, said = compare(old, [result(numbers=measured(peak_rss_bytes=2_100_000_000))])
    assert code == 1
    assert "peak GiB" in said


def test_a_case_that_gives_no_numbers_any_more_fails(compare) -> None:
    new = [without_numbers("peft=lora", Status.oom, "no room"), result("peft=full")]
    code, said = compare([result(), result("peft=full")], new)
    assert code == 1
    assert "peft=lora: measured before, now oom: no room" in said


@pytest.mark.parametrize(
    ("title", "facts", "says"),
    [
        ("hardware", {**HARDWARE, "cpu": "another"}, "hardware: cpu: a processor and another"),
        ("versions", {**VERSIONS, "torch": "2.14.0"}, "versions: torch: 2.13.0 and 2.14.0"),
        ("versions", {"dtune": "0.1.0"}, "versions: torch: 2.13.0 and absent"),
    ],
)
def test_another_machine_or_version_is_refused_without_force(
    compare, title: str, facts: dict[str, str], says: str
) -> None:
    other = result()
    other = replace(other, origin=replace(other.origin, **{title: facts}))
    code, said = compare([result()], [other])
    assert code == 2
    assert says in said
    assert "--force" in said
    assert "tokens/s" not in said
    code, said = compare([result()], [other], "--force")
    assert code == 0
    assert says in said
    assert "tokens/s" in said


def test_another_commit_is_told_and_compared(compare) -> None:
    other = result()
    other = replace(other, origin=replace(other.origin, commit="def"))
    code, said = compare([result()], [other])
    assert code == 0
    assert "differs: commit: abc and def" in said
    assert "differs" not in compare([result()], [result()])[1]
    # Beside what refuses it stands as well.
    other = replace(other, origin=replace(other.origin, hardware={"device": "another"}))
    assert "commit: abc and def" in compare([result()], [other])[1]


def test_cases_that_all_died_are_lost_and_not_of_another_machine(compare) -> None:
    dead = without_numbers("peft=lora", Status.failed, "exit code 1")
    dead = replace(dead, origin=replace(dead.origin, hardware={}, versions={}, commit=""))
    code, said = compare([result()], [dead])
    assert code == 1
    assert "peft=lora: measured before, now failed: exit code 1" in said


def test_other_work_under_the_same_name_is_refused(compare) -> None:
    other = replace(result(), settings={"peft.name": "lora", "train.micro_batch_size": 4})
    code, said = compare([result()], [other])
    assert code == 2
    assert "peft=lora: train.micro_batch_size: 2 and 4" in said


def test_a_case_that_was_measured_and_is_there_no_more_fails(compare) -> None:
    code, said = compare([result(), result("peft=full")], [result(), result("peft=dora")])
    assert code == 1
    assert "only in OLD: dtune peft=full" in said
    assert "only in NEW: dtune peft=dora" in said
    assert "cases=GLOB" in said
    # The numbers of the others are there as well.
    assert "peft=lora  tokens/s" in said
    # One more is no regression.
    code, said = compare([result()], [result(), result("peft=dora")])
    assert code == 0
    assert "only in NEW: dtune peft=dora" in said
    assert "cases=GLOB" not in said


def test_the_comparison_is_of_the_cases_that_are_named(compare) -> None:
    old = [result("peft=lora a=1"), result("peft=lora a=2"), result("peft=full a=1")]
    new = [result("peft=lora a=1"), result("peft=lora a=2")]
    code, said = compare(old, new, "cases=peft=lora*")
    assert code == 0
    assert "full" not in said
    slow = result("peft=lora a=2", numbers=measured(times(STEADY, 2.0)))
    assert compare(old, [new[0], slow], "cases=peft=lora*")[0] == 1
    assert compare(old, [new[0], slow], "cases=*a=1", "--force")[0] == 1
    assert compare(old, [new[0], slow], "cases=peft=lora a=1")[0] == 0
    # What another case was measured on is no obstacle either.
    other = replace(slow, origin=replace(slow.origin, hardware={**HARDWARE, "cpu": "another"}))
    assert compare(old, [new[0], other], "cases=*a=1", "cases=*")[0] == 2
    assert compare(old, [new[0], other])[0] == 2
    assert compare(old, [new[0], other], "cases=peft=lora a=1")[0] == 0


@pytest.mark.parametrize("pattern", ["peft=dora*", "lora", "peft=full"])
def test_a_name_that_fits_no_case_of_both_files_is_refused(compare, pattern: str) -> None:
    code, said = compare([result(), result("peft=full")], [result()], f"cases={pattern}")
    assert code == 2
    assert f"cases={pattern} fits no case: there are peft=lora" in said


def test_a_case_that_had_no_numbers_before_is_told_and_not_compared(compare) -> None:
    dead = without_numbers("peft=full", Status.oom, "no room")
    for now in ([result()], [result(), result("peft=full")], [result(), dead]):
        code, said = compare([result(), dead], now)
        assert code == 0
        assert "dtune peft=full: not compared, oom: no room in OLD" in said


def test_files_without_a_case_in_common_are_refused(compare) -> None:
    code, said = compare([result()], [result("peft=full")])
    assert code == 2
    assert "no case in common" in said


def test_wrong_arguments_are_answered(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "compare", "one"]) == 2
    assert "OLD and NEW" in capsys.readouterr().err
    assert main(["bench", "compare", str(tmp_path), str(tmp_path)]) == 2
    assert "results.jsonl: there is no such file" in capsys.readouterr().err
