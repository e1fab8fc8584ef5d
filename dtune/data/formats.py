"""Formats: from the columns of a raw row to the canonical row, one function each."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dtune.data.readers import RawRow, describe
from dtune.data.schema import REQUIRED, Format
from dtune.errors import DataError
from dtune.types import Message, Row

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "tool": "tool",
}
_MESSAGE_KEYS = ("role", "content", "name")


class MissingColumn(DataError):
    """A row lacks a column that its format needs; ``column`` is its name in the file."""

    def __init__(self, message: str, column: str) -> None:
        super().__init__(message)
        self.column = column


@dataclass(frozen=True)
class Columns:
    """The columns of one row by the names that the format gives them."""

    raw: RawRow
    renames: Mapping[str, str]

    def wrong(self, expected: str, found: object) -> DataError:
        """Build the error of this row: what was expected, and the value that was found."""
        return DataError(f"{self.raw.origin}: expected {expected}, found {describe(found)}")

    def value(self, name: str) -> object:
        """Value of a column that must be there.

        Raises:
            MissingColumn: It is not; names the nearest.
        """
        column = self.renames.get(name, name)
        if column not in self.raw.columns:
            present = list(self.raw.columns)
            near = difflib.get_close_matches(column, present, n=1)
            hint = f"; set data.columns={{{name}: {near[0]}}} if that is it" if near else ""
            found = ", ".join(present) or "none"
            raise MissingColumn(
                f"{self.raw.origin}: expected a column {column!r}, found: {found}{hint}", column
            )
        return self.raw.columns[column]

    def text(self, name: str) -> str:
        """Text of a column that must be there and not be blank."""
        value = self.value(name)
        if not isinstance(value, str):
            raise self.wrong(f"text in column {self.renames.get(name, name)!r}", value)
        if not value.strip():
            raise self.wrong(f"text that is not blank in column {name!r}", value)
        return self.clean(value, f"column {self.renames.get(name, name)!r}")

    def optional(self, name: str) -> str:
        """Text of a column, empty where it is missing, null or blank."""
        value = self.raw.columns.get(self.renames.get(name, name))
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.wrong(f"text in column {self.renames.get(name, name)!r}", value)
        where = f"column {self.renames.get(name, name)!r}"
        return self.clean(value, where) if value.strip() else ""

    def clean(self, value: str, where: str) -> str:
        """The text itself, if it is text that a tokenizer takes."""
        if "\0" in value:
            raise self.wrong(f"text without NUL characters in {where}", value)
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                # JSON can write half of a character of two code units.
                half = repr(error.object[error.start])
                raise self.wrong(f"whole characters in {where}", half) from error
        return value

    def objects(self, name: str) -> list[dict[str, Any]]:
        """List of objects that must be there and not be empty."""
        value = self.value(name)
        if not isinstance(value, list) or not value:
            raise self.wrong(f"a list of turns in column {name!r}", value)
        for turn in value:
            if not isinstance(turn, dict):
                raise self.wrong(f"turns that are objects in column {name!r}", turn)
        return value


Turns = tuple[Message, ...]


def from_alpaca(columns: Columns) -> Turns:
    """``instruction`` and, on a new line, ``input``; answered by ``output``; maybe ``system``."""
    question = columns.text("instruction")
    material = columns.optional("input")
    if material:
        question = f"{question}\n{material}"
    return _with_system(columns, question, columns.text("output"))


def from_prompt_completion(columns: Columns) -> Turns:
    """``prompt``, answered by ``completion``; maybe ``system``."""
    return _with_system(columns, columns.text("prompt"), columns.text("completion"))


def _with_system(columns: Columns, question: str, answer: str) -> Turns:
    system = columns.optional("system")
    head = (Message("system", system),) if system else ()
    return (*head, Message("user", question), Message("assistant", answer))


def from_messages(columns: Columns) -> Turns:
    """``messages``: turns with ``role`` and ``content``."""
    turns = []
    for turn in columns.objects("messages"):
        # What would be dropped in silence is refused: calls of tools, pictures, ...
        lost = [key for key, value in turn.items() if key not in _MESSAGE_KEYS and value]
        if lost:
            raise columns.wrong("turns with role and content only", lost)
        turns.append(_turn(columns, turn.get("role"), turn.get("content")))
    return _check_turns(columns, tuple(turns))


def from_sharegpt(columns: Columns) -> Turns:
    """``conversations``: turns with ``from`` (human, gpt, system, tool) and ``value``."""
    system = columns.optional("system")
    turns = [Message("system", system)] if system else []
    for turn in columns.objects("conversations"):
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            raise columns.wrong(f"'from' to be one of {', '.join(_SHAREGPT_ROLES)}", speaker)
        turns.append(_turn(columns, _SHAREGPT_ROLES[speaker], turn.get("value")))
    return _check_turns(columns, tuple(turns))


def _turn(columns: Columns, role: object, content: object) -> Message:
    if not isinstance(role, str) or not role:
        raise columns.wrong("a turn's role to be text", role)
    if isinstance(content, list):
        content = _join_parts(columns, content)
    if not isinstance(content, str):
        raise columns.wrong(f"text of the {role}'s turn", content)
    if role != "system" and not content.strip():
        raise columns.wrong(f"text of the {role}'s turn that is not blank", content)
    return Message(columns.clean(role, "a role"), columns.clean(content, f"the {role}'s turn"))


def _join_parts(columns: Columns, parts: list[Any]) -> str:
    """Text of content given as parts: ``[{"type": "text", "text": ...}, ...]``."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise columns.wrong("content in parts of type text", part)
    return "".join(part["text"] for part in parts)


def _check_turns(columns: Columns, turns: Turns) -> Turns:
    if all(turn.role != "assistant" for turn in turns):
        roles = ", ".join(turn.role for turn in turns)
        raise DataError(f"{columns.raw.origin}: expected an assistant's turn, found only: {roles}")
    return turns


_CONVERTERS: dict[Format, Callable[[Columns], Turns] | None] = {
    Format.alpaca: from_alpaca,
    Format.messages: from_messages,
    Format.sharegpt: from_sharegpt,
    Format.prompt_completion: from_prompt_completion,
    # The required column is plain text.
    Format.text: None,
}


def guess_formats(columns: Mapping[str, object]) -> list[str]:
    """Names of the formats whose required columns a row has."""
    return [
        form.value for form, names in REQUIRED.items() if all(name in columns for name in names)
    ]


def parse_row(index: int, raw: RawRow, form: Format, renames: Mapping[str, str]) -> Row:
    """Bring a raw row into canonical form.

    Raises:
        DataError: It is malformed; says where, what was expected and what was found.
    """
    if raw.problem:
        raise DataError(f"{raw.origin}: {raw.problem}")
    columns = Columns(raw, renames)
    convert = _CONVERTERS[form]
    if convert is None:
        return Row(index, raw.origin, text=columns.text(REQUIRED[form][0]))
    return Row(index, raw.origin, messages=convert(columns))
