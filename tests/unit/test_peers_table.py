"""The table of a comparison says what its file of results says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.peers.table import markdown, rows_of
from dtune.bench.record import read_jsonl
from tests.unit.peers import result

ROOT = Path(__file__).parents[2]


def cells(table: str, who: str) -> list[str]:
    """The cells of a contestant's line."""
    line = next(line for line in table.splitlines() if f"| {who} |" in line)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ratios_are_of_the_medians_of_all_rounds() -> None:
    table = markdown(
        [
            result("dtune", seconds=[1.0, 1.0, 1.0], peak_mib=100),
            result("hf-peft", seconds=[2.0, 2.0, 2.0], peak_mib=400),
            result("dtune", seconds=[3.0, 3.0, 3.0], peak_mib=200, repeat=1),
            result("hf-peft", seconds=[6.0, 6.0, 6.0], peak_mib=300, repeat=1),
        ]
    )
    peer = cells(table, "HF Trainer + peft")
    assert peer[2] == "4000.0 (2000.0 to 6000.0)"
    assert peer[-2:] == ["0.500", "0.500"]
    assert cells(table, "dtune")[-2:] == ["", ""]


def test_the_spread_between_rounds_is_shown() -> None:
    rounds = [result("dtune", seconds=[s, s, s], repeat=n) for n, s in enumerate([0.9, 1.0, 1.1])]
    (row,) = rows_of(rounds)
    assert row.spread == pytest.approx(0.2)


def test_settings_are_compared_with_the_same_one_of_dtune() -> None:
    table = markdown(
        [
            result("dtune", seconds=[1.0, 1.0]),
            result("dtune", seconds=[3.0, 3.0], setting="recompute"),
            result("trl", seconds=[6.0, 6.0], setting="recompute"),
        ]
    )
    assert cells(table, "TRL SFT")[-2] == "0.500"


def test_one_bad_run_takes_the_number_away() -> None:
    table = markdown(
        [result("dtune"), result("trl"), result("trl", repeat=1, reason="it diverged")]
    )
    assert "no number: it diverged" in cells(table, "TRL SFT")


def test_who_is_not_installed_has_a_line_that_says_so() -> None:
    table = markdown([result("dtune"), result("unsloth", reason="not installed: unsloth")])
    assert "no number: not installed: unsloth" in cells(table, "Unsloth")


def test_there_is_no_ratio_where_dtune_has_no_number() -> None:
    table = markdown([result("dtune", reason="it diverged"), result("trl")])
    assert cells(table, "TRL SFT")[-2:] == ["", ""]


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("peers-*.jsonl")))
def test_the_tables_that_are_kept_are_those_of_their_files(file: Path) -> None:
    table = markdown(read_jsonl(file))
    assert file.with_suffix(".md").read_text(encoding="utf-8") == table
    page = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    shown = re.findall(rf"<!-- {file.stem} -->\n(.*?)\n<!-- end -->", page, flags=re.DOTALL)
    assert shown == [table.strip()]
