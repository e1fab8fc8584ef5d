"""Files of rows: each reader yields rows with their columns as read, and where they came from.

A row that cannot be read is yielded with its problem, so that it can be counted and skipped. A
file that cannot be read at all raises DataError.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtune.errors import DataError

_BOM = b"\xef\xbb\xbf"
_JSON_BLANKS = " \t\r\n"
# Rows of a Parquet file that are made Python objects together.
_SLICE = 256


@dataclass(frozen=True)
class RawRow:
    """One row as read: its columns, or why it has none."""

    origin: str
    columns: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def describe(value: object) -> str:
    """Name the type of a value as JSON calls it, and show its head."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    names |= {int: "a number", float: "a number", type(None): "null"}
    kind = names.get(type(value), type(value).__name__)
    if value is None:
        return kind
    shown = value if isinstance(value, str) else repr(value)
    return f"{kind} ({shown[:40]!r})" if isinstance(value, str) else f"{kind} ({shown[:40]})"


def read_jsonl(path: Path) -> Iterator[RawRow]:
    """One JSON object a line; blank lines are no rows."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield _parse_line(line, f"{path}:{number}")


class _Pairs:
    """Makes the objects of JSON, and remembers a key that came twice in one of them."""

    def __init__(self) -> None:
        self.twice = ""

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """Called by the decoder for each object."""
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            self.twice = next(repr(name) for name in names if names.count(name) > 1)
        return made

    def row(self, value: object, origin: str) -> RawRow:
        """The row that a value is, if it is one; forgets what came twice in it."""
        twice, self.twice = self.twice, ""
        if not isinstance(value, dict):
            return RawRow(origin, problem=f"expected a JSON object, found {describe(value)}")
        if twice:
            return RawRow(origin, problem=f"expected each key once, found {twice} twice")
        return RawRow(origin, value)


def _parse_line(line: bytes, origin: str) -> RawRow:
    pairs = _Pairs()
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=pairs)
    except UnicodeDecodeError as error:
        return RawRow(origin, problem=f"expected UTF-8, found {_bad_bytes(error)}")
    except (ValueError, RecursionError) as error:
        found = _bad_json(error)
        return RawRow(origin, problem=f"expected one JSON object on the line, found: {found}")
    return pairs.row(value, origin)


def _bad_json(error: Exception) -> str:
    """What is wrong, without the line, which the origin tells."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error)


def _bad_bytes(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} at position {error.start + 1}"


def read_json(path: Path) -> Iterator[RawRow]:
    """A list of JSON objects; a file that begins with an object is read as JSON Lines."""
    try:
        text = path.read_bytes().removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: expected UTF-8, found {_bad_bytes(error)}") from error
    start = _skip_blanks(text, 0)
    if text[start : start + 1] == "{":
        yield from read_jsonl(path)
        return
    if text[start : start + 1] != "[":
        raise DataError(f"{path}: expected a JSON list of objects, found {text[start:][:40]!r}")
    yield from _parse_list(text, start + 1, path)


def _parse_list(text: str, position: int, path: Path) -> Iterator[RawRow]:
    """Elements one after another, so that each is known by its line."""
    pairs = _Pairs()
    decoder = json.JSONDecoder(object_pairs_hook=pairs)
    line, counted = 1, 0
    position = _skip_blanks(text, position)
    closed = text[position : position + 1] == "]"
    while not closed:
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            found = _bad_json(error)
            at = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise DataError(f"{path}:{at}: expected a JSON value, found: {found}") from error
        position = _skip_blanks(text, position)
        separator = text[position : position + 1]
        if separator not in (",", "]"):
            end_line = text.count("\n", 0, position) + 1
            found = repr(separator) if separator else "the end of the file"
            raise DataError(f"{path}:{end_line}: expected , or ] after an element, found {found}")
        yield pairs.row(value, f"{path}:{line}")
        closed = separator == "]"
        if not closed:
            position = _skip_blanks(text, position + 1)
    rest = text[position + 1 :].strip(_JSON_BLANKS)
    if rest:
        raise DataError(f"{path}: expected nothing after the list, found {rest[:40]!r}")


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in _JSON_BLANKS:
        position += 1
    return position


class _Lines:
    """Decoded lines for the csv module; remembers the line where UTF-8 broke."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem = ""

    def __iter__(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if number == 1:
                    line = line.removeprefix(_BOM)
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    self.problem = f"expected UTF-8, found {_bad_bytes(error)}"
                    text = line.decode("utf-8", errors="replace")
                yield text


def read_csv(path: Path) -> Iterator[RawRow]:
    """Comma-separated values with a header line; quoted fields may span lines."""
    csv.field_size_limit(2**31 - 1)
    lines = _Lines(path)
    reader = csv.reader(lines, strict=True)
    header: list[str] | None = None
    start = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:{start}: expected CSV, found: {error}") from error
        if fields is None:
            break
        origin, start = f"{path}:{start}", reader.line_num + 1
        if not fields:
            continue
        if header is None:
            header = _check_header(fields, lines.problem, path)
        else:
            yield _parse_fields(fields, header, lines.problem, origin)
        lines.problem = ""


def _check_header(fields: list[str], problem: str, path: Path) -> list[str]:
    if problem:
        raise DataError(f"{path}:1: {problem}")
    if len(set(fields)) != len(fields):
        raise DataError(f"{path}:1: expected a name for each column, found one twice: {fields}")
    return fields


def _parse_fields(fields: list[str], header: list[str], problem: str, origin: str) -> RawRow:
    if not problem and len(fields) != len(header):
        problem = f"expected {len(header)} fields as in the header, found {len(fields)}"
    if problem:
        return RawRow(origin, problem=problem)
    return RawRow(origin, dict(zip(header, fields, strict=True)))


def read_parquet(path: Path) -> Iterator[RawRow]:
    """Apache Parquet; the origin counts rows from 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for part in _slices(file.iter_batches(batch_size=1024)):
                yield from _parse_slice(part, path, number)
                number += part.num_rows
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: expected a Parquet file, found: {error}") from error


def _slices(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        for at in range(0, batch.num_rows, _SLICE):
            yield batch.slice(at, _SLICE)


def _parse_slice(batch: Any, path: Path, number: int) -> Iterator[RawRow]:
    """Rows of a part of a file; one by one where it has text that is not UTF-8."""
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError as error:
        if batch.num_rows == 1:
            problem = f"expected UTF-8, found {_bad_bytes(error)}"
            yield RawRow(f"{path}:{number + 1}", problem=problem)
            return
        for at in range(batch.num_rows):
            yield from _parse_slice(batch.slice(at, 1), path, number + at)
        return
    for at, columns in enumerate(rows, start=1):
        yield RawRow(f"{path}:{number + at}", columns)


def read_text(path: Path) -> Iterator[RawRow]:
    """Plain text: one row a paragraph, paragraphs end at blank lines; column ``text``."""
    paragraph: list[bytes] = []
    start = 1
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                start = start if paragraph else number
                paragraph.append(line)
            elif paragraph:
                yield _join_paragraph(paragraph, f"{path}:{start}")
                paragraph = []
    if paragraph:
        yield _join_paragraph(paragraph, f"{path}:{start}")


def _join_paragraph(lines: list[bytes], origin: str) -> RawRow:
    try:
        text = b"".join(lines).decode("utf-8").replace("\r\n", "\n").rstrip("\n")
    except UnicodeDecodeError as error:
        return RawRow(origin, problem=f"expected UTF-8, found {_bad_bytes(error)}")
    return RawRow(origin, {"text": text})


READERS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text,
}
"""Suffix of a file -> its reader."""
