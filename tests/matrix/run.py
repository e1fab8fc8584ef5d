"""The whole matrix: ``python -m tests.matrix.run [word ...]``; ``make matrix``.

Runs every legal cell on two processes that all cells share, prints each verdict, and writes
``tests/matrix/result.json``, ``docs/matrix.md`` and a table of README. With words, only the cells
whose names contain one of them are run anew; the others keep their last result. Exit code 1 if a
cell does not hold.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.distributed.pool import Pool, RankError
from tests.matrix.cells import Cell, legal_cells
from tests.matrix.check import Matrix, as_row
from tests.matrix.page import PAGE, README, RESULT, render, versions, with_summary


def main(words: list[str]) -> int:
    """Run and write; the exit code."""
    cells = legal_cells()
    before = json.loads(RESULT.read_text(encoding="utf-8"))["cells"] if words else []
    rows = {name_of(row): row for row in before}
    asked = [cell for cell in cells if not words or any(word in str(cell) for word in words)]
    pool = Pool(2)
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(pool, Path(folder))
        for number, cell in enumerate(asked, start=1):
            row = row_of(matrix, cell)
            rows[str(cell)] = row
            shown = "; ".join(row["problems"]) or f"holds, {row['seconds']:.1f} s"
            sys.stdout.write(f"[{number}/{len(asked)}] {cell}: {shown}\n")
            sys.stdout.flush()
    pool.close()
    kept = [rows[str(cell)] for cell in cells if str(cell) in rows]
    result = {"versions": versions(), "cells": kept}
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(render(result), encoding="utf-8")
    readme = README.read_text(encoding="utf-8")
    README.write_text(with_summary(readme, result), encoding="utf-8")
    bad = [row for row in kept if row["problems"]]
    sys.stdout.write(f"{len(kept) - len(bad)} of {len(cells)} legal cells hold; see {PAGE}\n")
    return int(bool(bad) or len(kept) < len(cells))


def row_of(matrix: Matrix, cell: Cell) -> dict[str, Any]:
    """The verdict on a cell, written down; a rank that failed is a problem of its cell."""
    try:
        return as_row(matrix.check(cell))
    except RankError as error:
        last = str(error).strip().splitlines()[-1]
        return {"peft": cell.peft, "quant": cell.quant, "engine": cell.engine, "problems": [last]}


def name_of(row: dict[str, Any]) -> str:
    """Name of the cell that a row is of."""
    return str(Cell(row["peft"], row["quant"], row["engine"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
