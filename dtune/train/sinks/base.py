"""The row of metrics, and what takes it."""

from __future__ import annotations

from typing import Protocol

Row = dict[str, str | int | float]
"""``kind`` (train, eval, resume, guard), ``step``, and numbers by name."""


class Sink(Protocol):
    """Takes rows in order of steps."""

    def write(self, row: Row) -> None:
        """Take a row."""
        ...

    def close(self) -> None:
        """Flush and release. Nothing is written afterwards."""
        ...
