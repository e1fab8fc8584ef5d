"""The table, the plots and the tables of pages: made from results, and of good ones alone."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

import pytest

from dtune.bench.pages import TABLES, with_tables
from dtune.bench.pages import main as write_pages
from dtune.bench.plots import NAMES, draw
from dtune.bench.record import Status, read_jsonl, write_jsonl
from dtune.bench.table import combine, line_of, markdown, markdown_in_short
from dtune.errors import ConfigError
from tests.unit.bench_results import SCORE, measured, result, without_numbers

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
METHODS = Path("benchmarks/results/methods-tiny-cpu.jsonl")


def rows_of(table: str) -> list[dict[str, str]]:
    """Cells by the name of their column."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    split = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(split[0], cells, strict=True)) for cells in split[2:]]


def test_a_row_has_the_medians_of_all_repeats() -> None:
    results = [
        result(numbers=measured((0.9, 1.0, 1.1))),
        result(numbers=measured((1.9, 2.0, 2.1)), repeat=1),
        result(numbers=measured((1.0, 1.1, 1.2)), repeat=2),
    ]
    (row,) = rows_of(markdown(results))
    assert row["case"] == "`peft=lora`"
    assert row["tokens/s in all"] == "909"  # of the median of 1.0, 2.0 and 1.1 s
    assert row["tokens/s per device"] == "455"
    # 1,250 positions in 1.1 s, of which 1,000 are tokens and 500 are trained on.
    assert row["with padding, tokens/s"] == "1,136"
    assert row["trained, tokens/s"] == "455"
    assert row["launches a step"] == "321 operations"
    assert row["planned GiB (error)"] == "2.200 (+10.0%)"
    assert row["spread"] == f"{statistics.stdev([1.0, 2.0, 1.1]) / 1.1:.1%}"


@pytest.mark.parametrize("status", [Status.oom, Status.refused, Status.failed])
def test_no_number_is_printed_of_a_case_without_one(status: Status) -> None:
    bad = without_numbers("peft=full", status, "why | it is so")
    rows = rows_of(markdown([result(), bad]))
    assert rows[1].pop("case") == f"`peft=full`: **{status.value}**: why \\| it is so"
    assert set(rows[1].values()) == {"-"}
    assert line_of(bad) == f"peft=full: {status.value}: why | it is so"


def test_one_bad_repeat_takes_the_numbers_of_the_others_away() -> None:
    bad = without_numbers("peft=lora", Status.refused, "its loss does not fall")
    (row,) = rows_of(markdown([result(), bad]))
    assert "refused" in row["case"]
    assert list(row) == ["case"]


def test_in_short_there_is_what_methods_are_chosen_by() -> None:
    table = markdown_in_short([result(score=SCORE), without_numbers("b", Status.oom, "no room")])
    first, second = rows_of(table)
    assert list(first) == [
        *("case", "tokens/s per device", "spread", "tensors GiB"),
        *("trained steps", "trained tokens", "held-out loss", "held-out exact_match"),
    ]
    assert first["tensors GiB"] == "2.000"
    assert second["case"] == "`b`: **oom**: no room"
    assert table.endswith("\nMeasured on device cpu, cpu a processor, cores 2.\n")


def test_runs_of_different_work_are_no_repeats_of_each_other() -> None:
    other = result(settings={"peft.name": "lora", "train.micro_batch_size": 4})
    with pytest.raises(ConfigError, match="different work have one name, dtune peft=lora"):
        markdown([result(), other])


def test_columns_of_what_nobody_knows_are_left_out() -> None:
    table = markdown([result()])
    assert "J a step" not in table
    assert "held-out" not in table
    assert "framework" not in table
    scored = markdown([result(score=SCORE), result(framework="hf-trainer")])
    rows = rows_of(scored)
    assert [row["held-out exact_match"] for row in rows] == ["50.0%", "-"]
    assert [row["framework"] for row in rows] == ["dtune", "hf-trainer"]


def test_below_the_table_stand_formula_machine_versions_command_and_notes() -> None:
    table = markdown([result(), result("peft=full", notes=("of full alone",))])
    for said in ("FLOPs a token = all of them", "cpu a processor", "torch 2.13.0", "abc"):
        assert said in table
    assert "- of full alone (peft=full)" in table
    assert "`dtune bench model=tiny`" in table


def test_of_a_single_run_the_spread_is_that_of_its_steps() -> None:
    (one,) = combine([result(numbers=measured((0.8, 1.0, 1.0, 1.2)))])
    width = (one.measured[0].p90_seconds - one.measured[0].p10_seconds) / 2
    assert one.spread == pytest.approx(width)
    assert one.within == pytest.approx(width / 2)


def test_plots_are_written_as_png_and_svg(tmp_path: Path) -> None:
    bad = without_numbers("peft=full", Status.oom, "no room")
    files = draw([result(score=SCORE), result("peft=qlora"), bad], tmp_path)
    assert {file.name for file in files} == {f"{n}.{e}" for n in NAMES for e in ("png", "svg")}
    for file in files:
        head = file.read_bytes()[:8]
        assert head == b"\x89PNG\r\n\x1a\n" if file.suffix == ".png" else head.startswith(b"<?xml")
    drawn = (tmp_path / "tokens_per_second.svg").read_text()
    assert "<!-- peft=qlora -->" in drawn
    assert "<!-- peft=full -->" not in drawn
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw([bad], tmp_path)


def test_a_marked_table_is_made_anew_from_its_file(tmp_path: Path) -> None:
    write_jsonl([result()], tmp_path / "r.jsonl")
    begin, end = "before\n<!-- bench: r.jsonl -->\n", "<!-- end of bench -->\nafter\n"
    made = with_tables(f"{begin}old\n{end}", tmp_path)
    assert made == f"{begin}{markdown([result()])}{end}"
    assert with_tables(made, tmp_path) == made
    # Those of another mark are left alone.
    assert with_tables(f"{begin}old\n{end}", tmp_path, "peers") == f"{begin}old\n{end}"


def test_a_table_that_does_not_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 tables begin, and 0"):
        with_tables("<!-- bench: r.jsonl -->\n", tmp_path)


def test_pages_are_written_by_name_and_a_table_without_results_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text("<!-- bench: r.jsonl -->\nold\n<!-- end of bench -->\n")
    assert write_pages(["page.md"]) == 2
    assert "r.jsonl: there is no such file" in capsys.readouterr().err
    write_jsonl([result()], tmp_path / "r.jsonl")
    assert write_pages(["page.md"]) == 0
    assert markdown([result()]) in page.read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_stands_in_a_page_is_what_its_file_gives(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for mark, table in TABLES.items():
        assert with_tables(text, ROOT, mark, table) == text


def test_every_method_is_in_the_table_of_the_readme() -> None:
    results = read_jsonl(ROOT / METHODS)
    assert {one.status for one in results} == {Status.ok}
    files = (ROOT / "conf" / "peft").glob("*.yaml")
    assert {one.case for one in results} == {f"peft={file.stem}" for file in files}
    for page, table in (("README.md", markdown_in_short), ("docs/bench.md", markdown)):
        assert table(results) in (ROOT / page).read_text(encoding="utf-8")
