"""Config of the data."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from enum import Enum

from dtune.errors import ConfigError


class Format(Enum):
    """What a row looks like."""

    alpaca = "alpaca"
    messages = "messages"
    sharegpt = "sharegpt"
    prompt_completion = "prompt_completion"
    text = "text"


REQUIRED = {
    Format.alpaca: ("instruction", "output"),
    Format.messages: ("messages",),
    Format.sharegpt: ("conversations",),
    Format.prompt_completion: ("prompt", "completion"),
    Format.text: ("text",),
}
"""Columns that a row must have, by format."""

OPTIONAL = {
    Format.alpaca: ("input", "system"),
    Format.messages: (),
    Format.sharegpt: ("system",),
    Format.prompt_completion: ("system",),
    Format.text: (),
}

TASK = "task"
"""Column that groups rows in the report of an evaluation, where there is one."""


class OnBadRow(Enum):
    """What a malformed row does."""

    error = "error"
    skip = "skip"


class OnLongRow(Enum):
    """What a row longer than max_length does."""

    error = "error"
    skip = "skip"
    truncate = "truncate"


@dataclass
class DataConfig:
    """Where rows come from, what they look like, and how they fill a batch."""

    name: str = "custom"
    # File or folder (jsonl, json, csv, parquet; txt: a row a paragraph), a Hub data set, or
    # dtune://... (embedded; dtune://corpus is generated).
    path: str = "???"
    # Held-out rows in the same format; "none": no evaluation.
    eval_path: str = "none"
    # Split of path, where it is a Hub data set.
    split: str = "train"
    # Split of eval_path, where it is a Hub data set.
    eval_split: str = "test"
    # alpaca: instruction/input/output; messages or sharegpt: turns; prompt_completion; text.
    format: Format = Format.alpaca
    # Renames columns: {what the format calls it: what your file calls it}.
    columns: dict[str, str] = field(default_factory=dict)
    # Longest row in tokens; with packing, the length of every packed row.
    max_length: int = 512
    # Put several whole rows into one sequence of max_length; attention stays inside each row.
    packing: bool = True
    # error: a malformed row stops before training; skip: it is left out, counted and listed in
    # RUN/left_out-train.jsonl, up to max_bad_share.
    on_bad_row: OnBadRow = OnBadRow.error
    # Largest share of rows that on_bad_row=skip may leave out; above it the run does not start.
    max_bad_share: float = 0.01
    # error, skip or truncate rows longer than max_length; what is cut is counted and printed.
    on_long_row: OnLongRow = OnLongRow.error
    # Shuffle the rows anew in every epoch, from the seed.
    shuffle: bool = True
    # Use only the first n rows of path; 0: all. Rows of eval_path are always used.
    max_rows: int = 0
    # Where tokenised data are kept, by content.
    cache_dir: str = "${oc.env:DTUNE_CACHE,'~/.cache/dtune'}"

    def __post_init__(self) -> None:
        self._check_columns()
        if self.max_length < 2:
            raise ConfigError(f"data.max_length={self.max_length} must be at least 2")
        if not 0.0 <= self.max_bad_share <= 1.0:
            raise ConfigError(f"data.max_bad_share={self.max_bad_share} must be in [0, 1]")
        if self.max_rows < 0:
            raise ConfigError(f"data.max_rows={self.max_rows} must be 0 (all rows) or more")

    def _check_columns(self) -> None:
        """ConfigError where a column is renamed that the format does not have."""
        known = [*REQUIRED[self.format], *OPTIONAL[self.format], TASK]
        for name in self.columns:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigError(
                    f"data.columns renames {name!r}, which data.format={self.format.value} does "
                    f"not have; it has {', '.join(known)}{hint}"
                )
