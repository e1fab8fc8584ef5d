"""Questions with known answers, from held-out rows."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from dtune.data.schema import TASK, DataConfig
from dtune.data.tokenize import Part
from dtune.errors import DataError
from dtune.types import Objective, Row

log = logging.getLogger("dtune")


@dataclass(frozen=True)
class Prompt:
    """What to generate from, and what should come out."""

    number: int
    """Of the prompt, from 0, in the order of the rows."""
    origin: str
    text: str
    """The last turn before the answer, for reports."""
    input_ids: list[int]
    expected: str
    task: str
    """Value of the row's column ``task``; empty where it has none."""


def read_prompts(
    config: DataConfig, objective: Objective, *, which: str = "eval", max_rows: int = 0
) -> tuple[Prompt, ...]:
    """Prompts of the rows that have one, at most ``max_rows`` (0: all).

    Empty where the objective asks for nothing, as plain text does. Left out and counted are rows
    that are malformed, for which ``prepare_dataset`` raises unless they are skipped, and those
    whose prompt alone fills data.max_length.
    """
    part = Part.of(config, which)
    prompts: list[Prompt] = []
    left_out = 0
    for raw, row in part.parse(part.open()):
        if max_rows and len(prompts) == max_rows:
            break
        try:
            if isinstance(row, DataError):
                raise row
            found = objective.prompt(row)
        except DataError:
            left_out += 1
            continue
        if found is None:
            continue
        if len(found[0]) >= config.max_length:
            left_out += 1
        else:
            task = raw.columns.get(config.columns.get(TASK, TASK))
            prompts.append(_build_prompt(len(prompts), row, found, task))
    if left_out:
        log.info("%s: %d rows are malformed or too long to be asked", part.path, left_out)
    return tuple(prompts)


def _build_prompt(number: int, row: Row, found: tuple[list[int], str], task: object) -> Prompt:
    input_ids, expected = found
    answered = [i for i, message in enumerate(row.messages) if message.role == "assistant"]
    asked = row.messages[: answered[-1]] if answered else ()
    return Prompt(
        number=number,
        origin=row.origin,
        text=asked[-1].content if asked else "",
        input_ids=input_ids,
        expected=expected,
        task="" if task is None else str(task),
    )
