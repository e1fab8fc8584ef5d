"""Malformed rows of ten kinds: the run stops and says where, or leaves exactly them out."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from dtune.data.dataset import TokenDataset
from dtune.data.schema import DataConfig, Format, OnBadRow, OnLongRow
from dtune.data.tokenize import prepare_dataset
from dtune.errors import DataError
from dtune.models.load import load_tokenizer
from dtune.models.schema import ModelConfig
from dtune.objectives.schema.sft import SftConfig
from dtune.runtime.world import World
from tests.integration.train_runs import assembled, settings

ROWS, SHARE, SEED = 400, 0.01, 5
GOOD = {"messages": [{"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "hi"}]}


def _turns(*turns: object) -> bytes:
    return json.dumps({"messages": list(turns)}).encode()


USER, ANSWER = GOOD["messages"]
BAD: dict[str, tuple[bytes, str]] = {
    "cut": (json.dumps(GOOD).encode()[:-20], "expected one JSON object on the line"),
    "not UTF-8": (b'{"messages": "\xff\xfe"}', "expected UTF-8, found byte 0xff"),
    "wrong type": (json.dumps({"messages": 5}).encode(), "a list of turns"),
    "empty": (b"{}", "expected a column 'messages'"),
    "null": (b"null", "expected a JSON object, found null"),
    "no assistant": (_turns(USER), "expected an assistant's turn"),
    "NUL": (_turns(USER, {"role": "assistant", "content": "h\0i"}), "without NUL"),
    "key twice": (
        b'{"messages": [{"role": "user", "role": "user", "content": "a"}]}',
        "expected each key once, found 'role' twice",
    ),
    "nested wrong": (_turns(USER, {"role": ["assistant"], "content": "hi"}), "role to be text"),
    "half a character": (
        b'{"messages": [{"role": "user", "content": "a"},'
        b' {"role": "assistant", "content": "\\ud83d"}]}',
        "whole characters",
    ),
}
LONG = _turns(USER, {"role": "assistant", "content": "x" * 1_000_000})


def write_rows(path: Path, bad: dict[str, bytes], share: float = SHARE) -> dict[int, str]:
    """``ROWS`` rows with that share of each kind of bad ones at seeded places; kinds by line."""
    chance = random.Random(SEED)
    each = round(ROWS * share)
    lines = chance.sample(range(1, ROWS + 1), each * len(bad))
    kinds = dict(zip(lines, [*bad] * each, strict=True))
    good = json.dumps(GOOD).encode()
    rows = [bad[kinds[line]] if line in kinds else good for line in range(1, ROWS + 1)]
    path.write_bytes(b"\n".join(rows) + b"\n")
    return kinds


Prepare = Callable[..., TokenDataset]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelConfig(path="dtune://tiny"))


@pytest.fixture
def prepare(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, world: World) -> Prepare:
    def run(path: Path, **fields: object) -> TokenDataset:
        fields = {"format": Format.messages, "on_bad_row": OnBadRow.skip, **fields}
        config = DataConfig(path=str(path), cache_dir=str(tmp_path / "cache"), **fields)  # type: ignore[arg-type]
        return prepare_dataset(
            config, SftConfig().build(tokenizer), which="train", fingerprint="", world=world
        )

    return run


def test_strict_stops_with_the_places_of_the_first_ten(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    kinds = write_rows(path, {kind: row for kind, (row, _) in BAD.items()})
    with pytest.raises(DataError) as refused:
        prepare(path, on_bad_row=OnBadRow.error)
    said = str(refused.value).splitlines()
    first = sorted(kinds)[:10]
    assert [line.strip().split(": ")[0] for line in said[1:-1]] == [f"{path}:{n}" for n in first]
    for line, number in zip(said[1:-1], first, strict=True):
        assert BAD[kinds[number]][1] in line
    assert "data.on_bad_row=skip" in said[-1]


def test_skip_leaves_out_exactly_the_bad_rows_and_lists_each(
    prepare: Prepare, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    kinds = write_rows(path, {**{kind: row for kind, (row, _) in BAD.items()}, "long": LONG})
    dataset = prepare(path, max_bad_share=0.2, on_long_row=OnLongRow.skip)
    counts = Counter(kinds.values())
    assert set(counts.values()) == {round(ROWS * SHARE)}
    report = dataset.report
    assert report.long.rows == counts["long"]
    assert report.rows_bad == len(kinds) - counts["long"]
    assert (report.rows_read, report.rows_kept) == (ROWS, ROWS - len(kinds))
    kept = [int(dataset.origin(number).rpartition(":")[2]) for number in range(len(dataset))]
    assert kept == [line for line in range(1, ROWS + 1) if line not in kinds]
    listed = [json.loads(line) for line in dataset.left_out.read_text().splitlines()]
    assert [row["row"] for row in listed] == [f"{path}:{line}" for line in sorted(kinds)]
    for row, line in zip(listed, sorted(kinds), strict=True):
        kind = kinds[line]
        assert ("above data.max_length" if kind == "long" else BAD[kind][1]) in row["why"]


@pytest.mark.parametrize(("limit", "stops"), [(0.0099, True), (0.01, False)])
def test_more_bad_rows_than_the_limit_stop_the_run(
    prepare: Prepare, tmp_path: Path, limit: float, stops: bool
) -> None:
    path = tmp_path / "rows.jsonl"
    kinds = write_rows(path, {"cut": BAD["cut"][0]})
    if not stops:
        assert prepare(path, max_bad_share=limit).report.rows_bad == len(kinds)
        return
    for _ in range(2):  # The second finds the rows in the cache.
        with pytest.raises(DataError, match=r"4 of 400 rows \(1\.00%\).*data\.max_bad_share"):
            prepare(path, max_bad_share=limit)


def test_one_percent_is_the_limit_if_none_is_set(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, {"cut": BAD["cut"][0]})
    assert len(prepare(path)) == ROWS - 4
    path.write_bytes(path.read_bytes() + b"null\n")
    with pytest.raises(DataError, match=r"5 of 401 rows .*data\.max_bad_share=0\.01"):
        prepare(path)


def test_parquet_csv_and_json_files_are_as_strict(prepare: Prepare, tmp_path: Path) -> None:
    texts = [b"hi"] * 300
    texts[17], texts[280] = b"\xff\xfe", b"a\0b"
    raw = pa.array(texts, pa.binary())
    columns = [pa.array(["Q"] * 300), pa.Array.from_buffers(pa.string(), 300, raw.buffers())]
    pq.write_table(pa.table(columns, ["instruction", "output"]), tmp_path / "a.parquet")
    answers = "".join(f"Q,{text}\n" for text in ["hi"] * 9 + ["", "a\0b"])
    (tmp_path / "a.csv").write_bytes(b"instruction,output\n" + answers.encode() + b"Q,\xff\nQ\n")
    rows = ['{"instruction": "Q", "output": "A"}'] * 3
    rows[1] = '{"instruction": "Q", "output": "A", "output": "B"}'
    (tmp_path / "a.json").write_text("[" + ",\n".join(rows) + "]")
    bad = {"a.parquet": [18, 281], "a.csv": [11, 12, 13, 14], "a.json": [2]}
    for name, lines in bad.items():
        dataset = prepare(tmp_path / name, format=Format.alpaca, max_bad_share=0.5)
        listed = [json.loads(line) for line in dataset.left_out.read_text().splitlines()]
        assert [row["row"] for row in listed] == [f"{tmp_path / name}:{line}" for line in lines]
        with pytest.raises(DataError, match=f"{name}:{lines[0]}: "):
            prepare(tmp_path / name, format=Format.alpaca, on_bad_row=OnBadRow.error)


def test_the_run_folder_lists_what_was_left_out(tmp_path: Path, world: World) -> None:
    path = tmp_path / "rows.jsonl"
    kinds = write_rows(path, {"cut": BAD["cut"][0]})
    more = [f"data.path={path}", "data.format=messages", "data.on_bad_row=skip", "data.max_rows=0"]
    with assembled(settings(tmp_path / "run", *more, f"data.eval_path={path}"), world):
        pass
    for which in ("train", "eval"):
        listed = (tmp_path / "run" / f"left_out-{which}.jsonl").read_text().splitlines()
        assert len(listed) == len(kinds)
        assert json.loads(listed[0])["row"] == f"{path}:{min(kinds)}"
