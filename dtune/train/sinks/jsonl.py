"""metrics.jsonl: every row in full precision."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from dtune.checkpoint.layout import naming
from dtune.runtime.logs import log
from dtune.train.sinks.base import Row


class JsonlSink:
    """Appends a line of JSON for each row at once.

    What a full disk does not take is kept, and written once it does; CheckpointError at the end
    where it never did. What is not finite is written as null.

    A resumed run appends: its row of kind ``resume`` tells from which step on later rows replace
    earlier ones. What a killed run left of a line is cut off.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with naming(path):
            if path.is_file():
                whole = path.read_bytes().rfind(b"\n") + 1
                os.truncate(path, whole)
            self._file = path.open("ab", buffering=0)
        self._waiting = b""

    def write(self, row: Row) -> None:
        """Append the row."""
        # An overflowing norm is infinite, which JSON cannot say.
        finite = {name: None if _is_infinite(value) else value for name, value in row.items()}
        had_room = not self._waiting
        self._waiting += json.dumps(finite, allow_nan=False).encode() + b"\n"
        try:
            self._append()
        except OSError as error:
            if had_room:
                log.warning("%s: %s; rows wait until there is room", self._path, error.strerror)

    def close(self) -> None:
        """Close the file."""
        with naming(self._path), self._file:
            self._append()

    def _append(self) -> None:
        """Write what waits, all of it or as far as the disk goes."""
        while self._waiting:
            written = self._file.write(self._waiting)
            self._waiting = self._waiting[written:]


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
