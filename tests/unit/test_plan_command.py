"""``dtune plan`` as a user reads it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest

from dtune.cli import main
from dtune.measure.passes import Passes
from dtune.plan.trace import KEPT, Tracer

TINY = ["plan", "experiment=quickstart", "kernels=torch"]
GIANT = [
    *("plan", "experiment=llama3_70b", "data=instruct", "train.global_batch_size=1024"),
    *("gpus=1024", "card=h200"),
]


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 0
    return capsys.readouterr().out


def number(text: str, pattern: str) -> float:
    match = re.search(pattern, text)
    assert match, (pattern, text[-3000:])
    return float(match.group(1).replace(",", ""))


def test_a_card_gives_floor_prediction_hours_and_assumptions(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = said(capsys, *TINY, "card=h200")
    floor = number(text, r"floor: ([\d.e+-]+) s a step")
    step = number(text, r"predicted: ([\d.e+-]+) s a step")
    assert 0 < floor < step
    steps = number(text, r"predicted: ([\d,]+) steps")
    hours = number(text, r"in ([\d.]+) hours")
    assert hours == pytest.approx(steps * step / 3600, abs=0.006)
    assert "fits h200" in text
    assert text.count("assumed:") == 1
    assert "data sheet" in text


def test_without_a_card_there_are_no_times(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, *TINY, "card=none")
    assert "card=h200 gives times" in text
    assert "predicted" not in text


def test_gpus_are_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    argv = (*TINY, "parallel=fsdp", "card=h100", "train.micro_batch_size=1")
    text = said(capsys, *argv, "gpus=16")
    assert "16 on 2 nodes (fsdp)" in text
    between = number(text, r"weights for forward over 16 ranks: [\d,]+ bytes from a rank, ([\d,]+)")
    assert between > 0
    text = said(capsys, *argv, "gpus=8")
    assert number(text, r"forward over 8 ranks: [\d,]+ bytes from a rank, ([\d,]+)") == 0


def test_what_is_found_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, *TINY, "card=4090", "find=max_length")
    length = int(number(text, r"find=max_length: data.max_length=([\d,]+)"))
    assert "fits 4090" in said(capsys, *TINY, "card=4090", f"data.max_length={length}")
    text = said(capsys, *TINY, "card=4090", "find=cheapest", "gpus=2", "parallel=ddp")
    assert "by predicted GPU-hours" in text


def test_auto_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    auto = ("parallel=auto", "train.recompute=auto", "train.micro_batch_size=1")
    text = said(capsys, *TINY, "card=h200", "gpus=4", *auto)
    assert re.search(r"auto +parallel=ddp train\.recompute=none: .* fits", text)
    assert "4 on 1 node (ddp)" in text


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("card=h300", "tflops="),
        ("find=longest", "max_length"),
        ("gpus=-1", "gpus=-1"),
        ("crad=h200", "card"),
        ("gpus=3", "train.global_batch_size"),
        ("find=max_length", "card=h200"),
    ],
)
def test_a_wrong_setting_is_told_with_what_is_right(
    capsys: pytest.CaptureFixture[str], wrong: str, told: str
) -> None:
    assert main([*TINY, "parallel=ddp", wrong]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("gpus=2",), "gpus=2 with parallel=single"),
        # Nothing says how much a simulated GPU holds.
        (("gpus=2", "parallel=auto"), "card=h200"),
        (("gpus=1", "train.recompute=auto"), "card=h200"),
    ],
)
def test_simulated_gpus_need_an_engine_and_for_auto_a_card(
    capsys: pytest.CaptureFixture[str], settings: tuple[str, ...], told: str
) -> None:
    assert main([*TINY, *settings]) == 2
    assert told in capsys.readouterr().err


def test_help_has_every_setting_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "plan", "--help")
    keys = ("find", "card", "gpus", "gpus_per_node", "tflops", "memory_gb", "network_gb")
    assert all(f"  {key}=" in text for key in keys)


def test_70b_on_1024_ranks_is_counted_on_a_few_blocks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    count = Tracer._count

    def note(tracer: Tracer, runs: Sequence[int], *further: Any) -> Passes:
        counted.append(sum(runs))
        return count(tracer, runs, *further)

    monkeypatch.setattr(Tracer, "_count", note)
    text = said(capsys, *GIANT)
    assert "1024 on 128 nodes (zero3)" in text
    assert "fits h200" in text
    assert counted == [KEPT, KEPT + 1]


def test_a_sweep_is_refused_and_trains_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "-m", "peft=lora,full"]) == 2
    assert "leave -m out" in capsys.readouterr().err


def test_hydras_flags_go_with_its_own_settings(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, *TINY, "card=h200", "gpus=2", "parallel=ddp", "--cfg", "job")
    assert "name: ddp" in text
    assert "predicted" not in text
