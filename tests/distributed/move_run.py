"""Every checkpoint under every engine and world: ``python -m tests.distributed.move_run``.

Also ``make move``. Runs all moves on pools of 1 to 4 processes that they share, prints each
verdict, and writes ``tests/distributed/move.json`` and ``docs/moving.md``. With words, only the
moves whose names contain one of them are run anew; the others keep their last result. Exit code 1
if a move does not hold.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.distributed.move_check import POINTS, WORLDS, Mover, all_moves, as_row
from tests.distributed.move_page import PAGE, RESULT, name_of, render
from tests.distributed.moving import Lengths
from tests.distributed.pool import Pool
from tests.matrix.page import versions

LENGTHS = Lengths(saved=5, total=15)


def main(words: list[str]) -> int:
    """Run and write; the exit code."""
    moves = all_moves()
    before = json.loads(RESULT.read_text(encoding="utf-8"))["moves"] if words else []
    rows = {name_of(row): row for row in before}
    asked = [move for move in moves if not words or any(word in str(move) for word in words)]
    pools = {size: Pool(size) for size in WORLDS}
    with tempfile.TemporaryDirectory() as folder:
        mover = Mover(Path(folder), LENGTHS, pools)
        for number, move in enumerate(asked, start=1):
            verdict = mover.check(move)
            rows[str(move)] = as_row(verdict)
            shown = "; ".join(verdict.problems) or f"holds, {verdict.loss:.0e}"
            sys.stdout.write(f"[{number}/{len(asked)}] {move}: {shown}\n")
            sys.stdout.flush()
            if number % len(POINTS) == 0 or number == len(asked):
                # It may take an hour: what is done is kept.
                write([rows[str(move)] for move in moves if str(move) in rows])
    for pool in pools.values():
        pool.close()
    good = [row for row in rows.values() if not row["problems"]]
    sys.stdout.write(f"{len(good)} of {len(moves)} moves hold; see {PAGE}\n")
    return int(len(good) < len(moves))


def write(rows: list[dict[str, Any]]) -> None:
    """The results and their page."""
    result = {"versions": versions(), "steps": [LENGTHS.saved, LENGTHS.total], "moves": rows}
    RESULT.write_text(dump(result), encoding="utf-8")
    PAGE.write_text(render(result), encoding="utf-8")


def dump(result: dict[str, Any]) -> str:
    """JSON with a line for each move."""
    moves = ",\n".join(json.dumps(row) for row in result["moves"])
    head = json.dumps({**result, "moves": []}, indent=1).removesuffix("[]\n}")
    return f"{head}[\n{moves}\n]}}\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
