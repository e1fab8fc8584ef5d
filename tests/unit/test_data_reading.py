"""Reading: every kind of file and format becomes rows, and each mistake is named where it is."""

import json
import logging
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtune.data.formats import parse_row
from dtune.data.readers import READERS, RawRow
from dtune.data.schema import DataConfig, Format
from dtune.data.sources import HubSource, open_source
from dtune.errors import ConfigError, DataError
from dtune.types import Message, Row


def read(path: Path) -> list[RawRow]:
    return list(READERS[path.suffix](path))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def parse(form: Format, columns: dict[str, object], **renames: str) -> Row:
    return parse_row(0, RawRow("f.jsonl:7", columns), form, renames)


ROWS = [{"prompt": "a,\nb", "completion": 'say "é"'}, {"prompt": "c", "completion": "d"}]


def test_all_kinds_of_file_give_the_same_rows(tmp_path: Path) -> None:
    files = {
        "a.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        "bom.jsonl": "\ufeff" + "\n\n".join(json.dumps(row) for row in ROWS),
        "a.json": json.dumps(ROWS, indent=2),
        "lines.json": "".join(json.dumps(row) + "\n" for row in ROWS),
        "a.csv": '\ufeffprompt,completion\r\n"a,\nb","say ""é"""\r\nc,d\r\n',
    }
    paths = [write(tmp_path / name, content) for name, content in files.items()]
    paths.append(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS), paths[-1])
    for path in paths:
        rows = read(path)
        assert [row.columns for row in rows] == ROWS, path
        assert not [row.problem for row in rows if row.problem]


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.jsonl", '{"a": "\u2028"}\n\n{"a": 2}\n', [1, 3]),
        ("a.json", '[\n {"a": 1},\n\n {"a":\n 2}, {"a": 3}\n]\n', [2, 4, 5]),
        ("a.csv", 'a,b\n1,2\n"x\ny",3\n4,5\n', [2, 3, 5]),
        ("a.txt", "\n\none\ntwo\n\n\nthree", [3, 7]),
    ],
)
def test_origin_is_the_line_where_the_row_begins(
    tmp_path: Path, name: str, content: str, lines: list[int]
) -> None:
    path = write(tmp_path / name, content)
    assert [row.origin for row in read(path)] == [f"{path}:{line}" for line in lines]


def test_text_is_a_row_a_paragraph(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\r\n two\n \nthree\n")
    assert [row.columns["text"] for row in read(path)] == ["one\n two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "line", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": "cu', 2, "expected one JSON object on the line, found: Unter"),
        ("a.jsonl", '{"a": 1} {"a": 2}', 1, "found: Extra data at column 10"),
        ("a.jsonl", b'{"a": "\xff"}', 1, "expected UTF-8, found byte 0xff at position 8"),
        ("a.jsonl", "[1, 2]", 1, "expected a JSON object, found a list ([1, 2])"),
        ("a.jsonl", "null", 1, "expected a JSON object, found null"),
        ("a.jsonl", "[" * 100_000, 1, "expected one JSON object"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", 1, "expected one JSON object"),
        ("a.json", '[{"a": 1},\n "text"]', 2, "expected a JSON object, found text ('text')"),
        ("a.csv", "a,b\n1\n", 2, "expected 2 fields as in the header, found 1"),
        ("a.csv", "a,b\n1,2,3\n", 2, "expected 2 fields as in the header, found 3"),
        ("a.csv", b"a,b\n1,2\n3,\xff\n4,5\n", 3, "expected UTF-8, found byte 0xff at position 3"),
        ("a.txt", b"ok\n\n\xff\n", 3, "expected UTF-8, found byte 0xff at position 1"),
    ],
)
def test_a_malformed_row_is_named_and_the_others_are_read(
    tmp_path: Path, name: str, content: str | bytes, line: int, message: str
) -> None:
    path = write(tmp_path / name, content)
    rows = read(path)
    bad = [row for row in rows if row.problem]
    assert [row.origin for row in bad] == [f"{path}:{line}"]
    assert message in bad[0].problem
    with pytest.raises(DataError, match="expected"):
        parse_row(0, bad[0], Format.text, {})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"a": 1},\n {"a": ]', r"a\.json:2: expected a JSON value, found: Expecting"),
        ("a.json", '[{"a": 1}', r"a\.json:1: expected , or \] after an element, found the end"),
        ("a.json", '[{"a": 1}\n{"a": 2}]', r"a\.json:2: expected , or \]"),
        ("a.json", "[] 5", r"a\.json: expected nothing after the list, found '5'"),
        ("a.json", '"text"', r"a\.json: expected a JSON list of objects, found '\"text\"'"),
        ("a.json", b'[\n"\xff"]', r"a\.json:2: expected UTF-8, found byte 0xff"),
        ("a.csv", 'a,b\n1,"2\n3', r"a\.csv:2: expected CSV, found: unexpected end"),
        ("a.csv", "a,a\n1,2", r"a\.csv:1: expected a name for each column, found one twice"),
        ("a.csv", b"a,\xff\n1,2", r"a\.csv:1: expected UTF-8"),
        ("a.parquet", "nothing of the kind", r"a\.parquet: expected a Parquet file, found"),
    ],
)
def test_a_file_that_cannot_be_read_at_all_is_an_error(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, content))


USER, ASSISTANT = Message("user", "Q"), Message("assistant", "A")
PART = {"type": "text", "text": "A"}


@pytest.mark.parametrize(
    ("form", "columns", "messages"),
    [
        (Format.alpaca, {"instruction": "Q", "output": "A"}, (USER, ASSISTANT)),
        (Format.alpaca, {"instruction": "Q", "input": None, "output": "A"}, (USER, ASSISTANT)),
        (
            Format.alpaca,
            {"instruction": "Q", "input": "x", "output": "A", "system": "S", "task": "t"},
            (Message("system", "S"), Message("user", "Q\nx"), ASSISTANT),
        ),
        (Format.prompt_completion, {"prompt": "Q", "completion": "A"}, (USER, ASSISTANT)),
        (
            Format.messages,
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
            (USER, ASSISTANT),
        ),
        (
            Format.messages,
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                    {"role": "assistant", "content": [PART, PART], "tool_calls": None},
                ]
            },
            (USER, Message("assistant", "AA")),
        ),
        (
            Format.sharegpt,
            {
                "system": "S",
                "conversations": [
                    {"from": "human", "value": "Q"},
                    {"from": "gpt", "value": "A"},
                    {"from": "tool", "value": "T"},
                ],
            },
            (Message("system", "S"), USER, ASSISTANT, Message("tool", "T")),
        ),
    ],
)
def test_formats_give_conversations(
    form: Format, columns: dict[str, object], messages: tuple[Message, ...]
) -> None:
    assert parse(form, columns) == Row(0, "f.jsonl:7", messages=messages)


def test_text_gives_text_and_columns_can_be_renamed() -> None:
    assert parse(Format.text, {"content": "T"}, text="content") == Row(0, "f.jsonl:7", text="T")
    renamed = parse(Format.alpaca, {"q": "Q", "a": "A"}, instruction="q", output="a")
    assert renamed.messages == (USER, ASSISTANT)


def user(content: object, **more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": content, **more}]}


@pytest.mark.parametrize(
    ("form", "columns", "message"),
    [
        (
            Format.alpaca,
            {"instructions": "Q", "output": "A"},
            "expected a column 'instruction', found: instructions, output; set "
            "data.columns={instruction: instructions} if that is it",
        ),
        (Format.alpaca, {"instruction": "Q", "output": 3}, "'output', found a number (3)"),
        (Format.alpaca, {"instruction": "Q", "output": None}, "'output', found null"),
        (Format.alpaca, {"instruction": "Q", "output": " "}, "not blank in column 'output'"),
        (Format.alpaca, {"instruction": "", "output": "A"}, "not blank in column 'instruction'"),
        (
            Format.alpaca,
            {"instruction": "Q", "input": ["x"], "output": "A"},
            "found a list (['x'])",
        ),
        (Format.text, {"text": True}, "expected text in column 'text', found true or false (True)"),
        (Format.text, {}, "expected a column 'text', found: none"),
        (Format.messages, {"messages": "Q"}, "expected a list of turns in column 'messages'"),
        (Format.messages, {"messages": []}, "expected a list of turns in column 'messages'"),
        (Format.messages, {"messages": ["Q"]}, "expected turns that are objects"),
        (Format.messages, user("Q"), "expected an assistant's turn, found only: user"),
        (Format.messages, user(""), "expected text of the user's turn that is not blank"),
        (Format.messages, user(None), "expected text of the user's turn, found null"),
        (Format.messages, user([{"type": "image"}]), "expected content in parts of type text"),
        (Format.messages, user("Q", tool_calls=[1]), "expected turns with role and content only"),
        (Format.messages, {"messages": [{"content": "Q"}]}, "a turn's role to be text, found null"),
        (
            Format.sharegpt,
            {"conversations": [{"from": "robot", "value": "A"}]},
            "expected 'from' to be one of system, human, user, gpt, assistant, tool, found text",
        ),
    ],
)
def test_a_row_of_the_wrong_form_says_what_was_expected_and_found(
    form: Format, columns: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError) as error:
        parse(form, columns)
    assert str(error.value).startswith("f.jsonl:7: expected")
    assert message in str(error.value)


def test_renaming_a_column_that_the_format_lacks_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"data\.columns.*'instrution'.*mean instruction\?"):
        DataConfig(columns={"instrution": "q"})
    DataConfig(columns={"instruction": "q", "task": "kind"})


def source_rows(path: object) -> list[RawRow]:
    return list(open_source(str(path), split="train", key="data.path").rows())


def test_a_folder_is_read_in_order_without_what_is_hidden_or_no_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b.jsonl", "a/z.jsonl", ".hidden/x.jsonl", "a/.y.jsonl"):
        write(tmp_path / name, json.dumps({"text": name}))
    write(tmp_path / "c.TXT", "c.TXT")
    write(tmp_path / "README.md", "no data")
    with caplog.at_level(logging.INFO, logger="dtune"):
        rows = source_rows(tmp_path)
    assert [row.columns["text"] for row in rows] == ["a/z.jsonl", "b.jsonl", "c.TXT"]
    assert "README.md" in caplog.text


def test_what_is_not_there_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", "{}")
    (tmp_path / "empty").mkdir()
    write(tmp_path / "model.bin", "")
    cases = {
        tmp_path / "trian.jsonl": "no such file or folder; did you mean train.jsonl",
        tmp_path / "no" / "x.jsonl": "no such file or folder, nor a folder",
        tmp_path / "empty": "the folder has no file that ends in .jsonl",
        tmp_path / "model.bin": "expected a file that ends in one of .jsonl",
        "not a name": "no such file or folder",
        "missing.csv": "no such file or folder",
    }
    for path, message in cases.items():
        with pytest.raises(DataError) as error:
            source_rows(path)
        assert str(error.value).startswith(f"data.path={path}")
        assert message in str(error.value)


def test_a_hub_name_is_loaded_through_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "set" / "train.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS))
    source = HubSource(str(tmp_path / "set"), split="train", key="data.path")
    assert [row.columns for row in source.rows()] == ROWS
    again = HubSource(str(tmp_path / "set"), split="train", key="data.path")
    assert again.fingerprint() == source.fingerprint()
    with pytest.raises(DataError, match=r"data\.path=.*split tset"):
        HubSource(str(tmp_path / "set"), split="tset", key="data.path")


def test_a_hub_name_that_cannot_be_reached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"data\.path=nobody/nothing: there is no such file or"):
        source_rows("nobody/nothing")


def test_the_corpus_is_read_without_a_file() -> None:
    source = open_source("dtune://corpus", split="train", key="data.path")
    rows = list(islice(source.rows(), 3))
    assert [row.origin for row in rows] == [f"dtune://corpus:{n}" for n in (1, 2, 3)]
    assert all(parse_row(0, row, Format.text, {}).text for row in rows)
    assert source.fingerprint() == source.fingerprint()
