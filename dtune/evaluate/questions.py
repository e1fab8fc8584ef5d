"""Prompts of a file or a conversation, rendered as the objective renders its training rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtune.data.formats import parse_row
from dtune.data.readers import READERS, RawRow, describe
from dtune.data.schema import DataConfig, Format
from dtune.errors import ConfigError, DataError
from dtune.resources import resolve_path
from dtune.types import Message, Objective, Row

ADAPTER = "adapter"
"""Column that names the adapter that answers a row, where there are several."""

# Format -> the column that asks, and the one that answers, which a prompt may lack.
_ASKING = {
    Format.messages: ("messages", ""),
    Format.sharegpt: ("conversations", ""),
    Format.alpaca: ("instruction", "output"),
    Format.prompt_completion: ("prompt", "completion"),
}
# Stands where a prompt has no answer; what is before it is rendered, and it is not.
_NO_ANSWER = "?"


@dataclass(frozen=True)
class AskedRow:
    """One prompt, ready to be generated from."""

    number: int
    """From 0, in the order of the file."""
    origin: str
    text: str
    """The last turn before the answer."""
    input_ids: list[int]
    expected: str = ""
    """The answer that the row has; empty where it has none."""
    adapter: str = ""
    """What the row names in its column ``adapter``."""


def read_questions(path: str, data: DataConfig, objective: Objective) -> list[AskedRow]:
    """All prompts of a file, in its order.

    A ``.txt`` file holds one prompt a line. Others hold rows in a format that training reads, in
    that of ``data`` or the one that their columns tell; the answer may be missing, and one that
    is there is not shown to the model. Raises DataError for the first row that is malformed.
    """
    place = Path(resolve_path(path)).expanduser()
    if place.suffix.lower() not in READERS:
        raise ConfigError(f"prompts={path}: expected a file that ends in {', '.join(READERS)}")
    if not place.is_file():
        raise ConfigError(f"prompts={path}: there is no such file")
    rows = _lines(place) if place.suffix.lower() == ".txt" else READERS[place.suffix.lower()](place)
    read = _continued if data.format is Format.text else _asked
    found = [read(number, raw, data, objective) for number, raw in enumerate(rows)]
    if not found:
        raise DataError(f"prompts={path} holds no prompt")
    return found


def _lines(path: Path) -> Iterator[RawRow]:
    with path.open(encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield RawRow(f"{path}:{number}", {"text": line.rstrip("\r\n")})
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: expected UTF-8: {error.reason}") from error


def _asked(number: int, raw: RawRow, data: DataConfig, objective: Objective) -> AskedRow:
    """The question of a conversation."""
    if raw.problem:
        raise DataError(f"{raw.origin}: {raw.problem}")
    form, renames = _choose_format(raw, data)
    if form is Format.text:
        turns = (Message("user", str(raw.columns["text"])), Message("assistant", _NO_ANSWER))
        row, answered = Row(number, raw.origin, messages=turns), False
    else:
        columns, answered = _with_answer(raw.columns, form, renames)
        row = parse_row(number, RawRow(raw.origin, columns), form, renames)
    rendered = objective.prompt(row)
    assert rendered is not None, "the row has an assistant's turn"
    turns_before = row.messages[:-1]
    return AskedRow(
        number,
        raw.origin,
        text=turns_before[-1].content if turns_before else "",
        input_ids=rendered[0],
        expected=rendered[1] if answered else "",
        adapter=_named_adapter(raw),
    )


def _continued(number: int, raw: RawRow, data: DataConfig, objective: Objective) -> AskedRow:
    """Plain text that is gone on with."""
    column = data.columns.get("text", "text")
    name = column if column in raw.columns else "prompt"
    if name not in raw.columns:
        raise DataError(f"{raw.origin}: {raw.problem or f'expected a column {column!r}'}")
    text = raw.columns[name]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{raw.origin}: expected text in column {name!r}, found {describe(text)}")
    rendered = objective.render(Row(number, raw.origin, text=text)).input_ids
    # Without the token that ends the document.
    return AskedRow(number, raw.origin, text, rendered[:-1], adapter=_named_adapter(raw))


def _named_adapter(raw: RawRow) -> str:
    name = raw.columns.get(ADAPTER)
    if name is None:
        return ""
    if not isinstance(name, str):
        raise DataError(f"{raw.origin}: expected the name of an adapter, found {describe(name)}")
    return name


def _choose_format(raw: RawRow, data: DataConfig) -> tuple[Format, Mapping[str, str]]:
    """The format of ``data`` if the row has its column, else what its columns tell."""
    own = _ASKING.get(data.format)
    if own is not None and data.columns.get(own[0], own[0]) in raw.columns:
        return data.format, data.columns
    for form, (asking, _) in _ASKING.items():
        if asking in raw.columns:
            return form, {}
    if isinstance(raw.columns.get("text"), str):
        return Format.text, {}
    wanted = ", ".join([*(asking for asking, _ in _ASKING.values()), "text"])
    found = ", ".join(raw.columns) or "none"
    raise DataError(f"{raw.origin}: expected one of the columns {wanted}; found: {found}")


def _with_answer(
    columns: Mapping[str, Any], form: Format, renames: Mapping[str, str]
) -> tuple[dict[str, Any], bool]:
    """The columns with something in the answer's place, and whether it is the row's own."""
    asking, answering = _ASKING[form]
    if answering:
        name = renames.get(answering, answering)
        if columns.get(name):
            return dict(columns), True
        return {**columns, name: _NO_ANSWER}, False
    name = renames.get(asking, asking)
    turns = columns[name]
    speaker, said, ours = "role", "content", ["assistant"]
    if form is Format.sharegpt:
        speaker, said, ours = "from", "value", ["gpt", "assistant"]
    last = turns[-1] if isinstance(turns, list) and turns else None
    if not isinstance(last, dict) or last.get(speaker) in ours:
        return dict(columns), True
    return {**columns, name: [*turns, {speaker: ours[0], said: _NO_ANSWER}]}, False


def ask_conversation(
    messages: Sequence[Message], objective: Objective, *, number: int
) -> AskedRow | None:
    """A conversation whose last turn is to be answered; None where the objective has no turns."""
    turns = (*messages, Message("assistant", _NO_ANSWER))
    rendered = objective.prompt(Row(number, "the conversation", messages=turns))
    if rendered is None:
        return None
    return AskedRow(number, "the conversation", messages[-1].content, rendered[0])


def check_lengths(
    questions: Sequence[AskedRow], *, max_new_tokens: int, max_positions: int
) -> None:
    """Raise DataError for a prompt that leaves no room for its answer; 0 positions: no limit."""
    for question in questions:
        needed = len(question.input_ids) + max_new_tokens
        if 0 < max_positions < needed:
            raise DataError(
                f"{question.origin}: {len(question.input_ids)} tokens and max_new_tokens="
                f"{max_new_tokens} are more than the {max_positions} positions of the model; set "
                f"max_new_tokens={max(1, max_positions - len(question.input_ids))}, or shorten it"
            )
