"""Rows as aligned text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def columns(rows: Iterable[Sequence[str]]) -> str:
    """Rows as lines, all cells but the last padded to the width of their column."""
    table = list(rows)
    width = [max(len(row[i]) for row in table if len(row) > i) for i in range(max(map(len, table)))]
    lines = []
    for row in table:
        cells = [cell.ljust(width[i]) for i, cell in enumerate(row[:-1])]
        lines.append("  " + "  ".join([*cells, row[-1]]))
    return "\n".join(lines)
