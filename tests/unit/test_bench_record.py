"""Results as lines of JSON: whole again when read, and no numbers of a case that failed a gate."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dtune.bench.record import Status, read_jsonl, to_json, write_jsonl
from dtune.errors import ConfigError
from tests.unit.bench_results import SCORE, measured, result, without_numbers


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = [
        result(),
        result(repeat=1, score=SCORE),
        without_numbers("peft=full", Status.oom, "no room"),
    ]
    write_jsonl(written[:1], tmp_path / "r.jsonl")
    write_jsonl(written[1:], tmp_path / "r.jsonl", append=True)
    assert read_jsonl(tmp_path / "r.jsonl") == written


def test_a_case_that_is_not_ok_has_no_numbers_and_says_why() -> None:
    with pytest.raises(AssertionError):
        result(status=Status.refused, reason="its loss does not fall")
    with pytest.raises(AssertionError):
        result(status=Status.refused, measured=None)
    with pytest.raises(AssertionError):
        result(measured=None)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "JSONDecodeError"),
        (to_json(result()).replace('"schema": 1', '"schema": 99'), "form 99"),
        (to_json(result()).replace('"median_seconds"', '"middle_seconds"'), "middle_seconds"),
        (to_json(result()).replace('"status": "ok"', '"status": "fine"'), "fine"),
    ],
    ids=["no JSON", "another form", "another field", "no such status"],
)
def test_what_is_no_result_is_named_by_its_line(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "r.jsonl"
    file.write_text(f"{to_json(result())}\n{line}\n")
    with pytest.raises(ConfigError, match=rf"r\.jsonl:2 is no result.*{says}"):
        read_jsonl(file)


def test_no_file_and_an_empty_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_jsonl(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ConfigError, match="holds no results"):
        read_jsonl(tmp_path / "empty.jsonl")


def test_a_line_has_no_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(result(numbers=measured(loss_last=float("nan"))))


def test_every_field_is_plain_json() -> None:
    line = json.loads(to_json(result(score=SCORE)))
    assert line["status"] == "ok"
    assert set(line) == {field.name for field in dataclasses.fields(result())}


def test_rates_and_shares_follow_from_the_median_step() -> None:
    one = measured((0.5, 0.5, 0.5))
    assert one.tokens_per_second_per_device == 1000
    assert one.slots_per_second == 2500
    assert one.targets_per_second == 1000
    assert one.mfu == pytest.approx(1000 * 2e6 / 1e10)
    assert one.share_of_ceiling == pytest.approx(1000 * 2e6 / 4e9)
    assert measured(peak_flops=None).mfu is None


def test_the_plan_is_held_against_tensors_and_not_against_the_process() -> None:
    # 2.2 GiB planned, 2 GiB of tensors in a process of 3 GiB.
    assert measured().plan_error == pytest.approx(0.1, abs=1e-6)
    on_device = measured(peak_allocated_bytes=2 << 30, peak_reserved_bytes=3 << 30)
    assert on_device.plan_error == pytest.approx(0.1, abs=1e-6)
    assert measured(planned_bytes=None).plan_error is None
    assert measured(counted_bytes=None).plan_error is None
