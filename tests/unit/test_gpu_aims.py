"""The aims of training on a GPU, held against files of results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import aims
from benchmarks.aims import BENCH, PEERS_1B, PEERS_8B, TOKENS_PER_SECOND, main
from dtune.bench.record import CaseResult, Status, write_jsonl
from tests.unit.bench_results import measured, result, without_numbers

GIB = 1 << 30


def benched(quant: str, seconds: float, *, planned: float = 1.0) -> CaseResult:
    """A case of 1,000 tokens a step, whose plan is so many times its peak."""
    peft = {"none": "lora", "nf4": "qlora"}[quant]
    numbers = measured(
        (seconds,) * 3, peak_allocated_bytes=40 * GIB, planned_bytes=int(planned * 40 * GIB)
    )
    return result(f"peft={peft}", numbers, settings={"quant.name": quant})


def peer(who: str, case: str, seconds: float, *, gib: int = 40) -> CaseResult:
    numbers = measured((seconds,) * 3, peak_allocated_bytes=gib * GIB, planned_bytes=None)
    return result(case, numbers, framework=who)


FAST = 1000 / TOKENS_PER_SECOND
"""Seconds of a step that is just fast enough."""
GOOD = {
    BENCH: [benched("none", FAST), benched("nf4", FAST * 1.05)],
    PEERS_8B: [
        *(peer("dtune", "llama8b plain", 1.0), peer("hf-peft", "llama8b plain", 1.3, gib=70)),
        *(peer("dtune", "llama8b recompute", 1.0), peer("hf-peft", "llama8b recompute", 1.7)),
    ],
    PEERS_1B: [peer("dtune", "llama1b plain", 1.0), peer("hf-peft", "llama1b plain", 1.6)],
}


def write(folder: Path, files: dict[str, list[CaseResult]]) -> None:
    for name, results in files.items():
        write_jsonl(results, folder / f"{name}.jsonl")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, ""),
        ({BENCH: [benched("none", FAST * 1.01), benched("nf4", FAST)]}, "missed, 16,040"),
        ({BENCH: [benched("none", FAST), benched("nf4", FAST * 1.2)]}, "missed, 0.833"),
        ({PEERS_1B: [GOOD[PEERS_1B][0], peer("hf-peft", "llama1b plain", 1.4)]}, "missed, 1.400"),
        (
            {PEERS_1B: [GOOD[PEERS_1B][0], peer("hf-peft", "llama1b plain", 1.6, gib=39)]},
            "peak memory of hf-peft, llama1b plain: wanted at most 1.000: missed, 1.026",
        ),
    ],
)
def test_each_aim_of_speed_is_judged(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    files: dict[str, list[CaseResult]],
    says: str,
) -> None:
    write(tmp_path, {**GOOD, **files})
    code = main(["speed", str(tmp_path)])
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 8
    assert said.count(": missed") == code == bool(says)
    assert said.count(": met") == 8 - code
    assert says in said


def test_what_was_not_measured_is_not_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = without_numbers("llama8b plain", Status.oom, "no room")
    write(
        tmp_path,
        {
            BENCH: [benched("none", FAST)],
            PEERS_8B: [replace(lost, framework="hf-peft"), *GOOD[PEERS_8B][:1]],
        },
    )
    assert main(["speed", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "not measured, there is no result of peft=qlora" in said
    assert "not measured, hf-peft: oom: no room" in said
    assert said.count(": not measured") == 7


@pytest.mark.parametrize(("planned", "code"), [(1.09, 0), (0.92, 0), (1.11, 1), (0.89, 1)])
def test_a_plan_may_be_a_tenth_off_its_peak(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], planned: float, code: int
) -> None:
    write(tmp_path, {"one": [benched("none", 1.0), benched("nf4", 1.0, planned=planned)]})
    assert main(["plan", str(tmp_path / "one.jsonl")]) == code
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2
    assert said[0].endswith(": met, 0.0%")
    assert f"wanted at most 10.0%: {'missed' if code else 'met'}" in said[1]


def test_a_case_without_a_plan_or_without_results_is_not_met(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unplanned = result(numbers=measured(planned_bytes=None), notes=("memory is not planned",))
    write(tmp_path, {"one": [unplanned, without_numbers("peft=full", Status.oom, "no room")]})
    files = [str(tmp_path / name) for name in ("one.jsonl", "absent.jsonl")]
    assert main(["plan", *files]) == 1
    said = capsys.readouterr().out
    assert "peft=lora: wanted at most 10.0%: not measured, memory is not planned" in said
    assert "not measured, oom: no room" in said
    assert "absent: wanted at most 10.0%: not measured, there are no results" in said


@pytest.mark.parametrize("arguments", [[], ["plan"], ["speed", "a", "b"], ["else", "a"]])
def test_wrong_arguments_are_answered(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert aims.main(arguments) == 2
    assert "takes plan FILE ... or speed FOLDER" in capsys.readouterr().err
