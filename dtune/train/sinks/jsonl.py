"""metrics.jsonl: every row in full precision."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from dtune.checkpoint.layout import naming
from dtune.train.sinks.base import Row


class JsonlSink:
    """Appends a line of JSON for each row, flushed at once; CheckpointError where it cannot.

    What is not finite is written as null.

    A resumed run appends: its row of kind ``resume`` tells from which step on later rows replace
    earlier ones. What a killed run left of a line is cut off.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with naming(path):
            if path.is_file():
                whole = path.read_bytes().rfind(b"\n") + 1
                os.truncate(path, whole)
            self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        """Append the row."""
        with naming(self._path):
            # An overflowing norm is infinite, which JSON cannot say.
            finite = {name: None if _is_infinite(value) else value for name, value in row.items()}
            self._file.write(json.dumps(finite, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with naming(self._path):
            self._file.close()


def _is_infinite(value: str | float) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def read_metrics(path: Path) -> list[Row]:
    """Rows of a metrics.jsonl, without those that a resumed run has replaced."""
    rows: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break  # A run is writing it, or was killed when it did.
        row: Row = json.loads(line)
        if row["kind"] == "resume":
            rows = [earlier for earlier in rows if int(earlier["step"]) <= int(row["step"])]
        rows.append(row)
    return rows
