"""The table of a comparison says what its file of results says."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.peers.table import MARK, main, markdown, rows_of
from dtune.bench.pages import with_tables
from dtune.bench.record import read_jsonl, write_jsonl
from dtune.bench.table import combine
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


def test_models_are_apart_and_no_repeats_of_each_other() -> None:
    both = [
        result(who, model=model, seconds=[seconds])
        for model, times in {"tiny": (1.0, 2.0), "random50m": (3.0, 4.0)}.items()
        for who, seconds in zip(("dtune", "hf-peft"), times, strict=True)
    ]
    small, large = markdown(both).split("### random50m")
    assert cells(small, "HF Trainer + peft")[-2] == "0.500"
    assert cells(large, "HF Trainer + peft")[-2] == "0.750"
    # As `dtune bench compare` reads them, too.
    assert [len(one.results) for one in combine(both)] == [1, 1, 1, 1]


def test_the_tables_of_a_page_are_written_from_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl([result("dtune"), result("trl")], tmp_path / "r.jsonl")
    page = tmp_path / "page.md"
    page.write_text("<!-- peers: r.jsonl -->\nold\n<!-- end of peers -->\n")
    assert main(["page.md"]) == 0
    table = markdown([result("dtune"), result("trl")])
    assert page.read_text() == f"<!-- peers: r.jsonl -->\n{table}<!-- end of peers -->\n"
    assert main(["no.jsonl"]) == 2


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
    assert file.with_suffix(".md").read_text(encoding="utf-8") == markdown(read_jsonl(file))


def test_what_stands_in_the_page_is_what_its_files_give() -> None:
    text = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    assert with_tables(text, ROOT, MARK, markdown) == text


@pytest.mark.parametrize("model", ["tiny", "random50m"])
def test_on_a_cpu_dtune_takes_at_most_the_time_and_memory_of_others(model: str) -> None:
    """Of what was measured; with everything compiled by torch they are as fast as each other."""
    results = read_jsonl(ROOT / "benchmarks" / "results" / "peers-cpu.jsonl")
    rows = {
        (row.setting, row.who): row
        for row in rows_of(one for one in results if one.settings["model"] == model)
        if row.runs
    }
    compared = [(setting, who) for setting, who in rows if who != "dtune"]
    assert {("plain", "hf-peft"), ("recompute", "hf-peft"), ("plain", "trl")} <= set(compared)
    for setting, who in compared:
        own, other = rows[setting, "dtune"], rows[setting, who]
        assert own.peak_bytes <= other.peak_bytes, (setting, who)
        # Of compiled ones neither is the faster beyond what rounds differ by.
        noise = max(own.spread, other.spread) if setting == "best" else 0.0
        assert own.median <= other.median * (1 + noise), (setting, who)
