"""The page that shows who can go on from whose checkpoint, made from the results of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.distributed.move_check import LOSS_LIMIT, POINTS
from tests.distributed.moving import GLOBAL_BATCH, METHODS, ROWS

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "tests" / "distributed" / "move.json"
PAGE = ROOT / "docs" / "moving.md"

HEAD = f"""# Going on elsewhere: every engine and number of processes

Written by `make move`. Each engine and number of processes (a row) trains a small model and is
saved in the middle; each (a column) goes on from that. A move holds if weights and optimizer state
are bit for bit what was saved, if each loss after it is at most {LOSS_LIMIT:g} from that of the run
that was not stopped (0 where nothing has changed), and if the {GLOBAL_BATCH} sequences of each step
are the same in the same order, over epochs of {ROWS} rows of which none comes twice or is lost.
Accumulation changes with the number of processes. In the tables: the largest difference of a loss.
Raw numbers: `tests/distributed/move.json`.
"""
ABOUT = {"lora": "rows packed", "full": "rows padded"}


def name_of(row: dict[str, Any]) -> str:
    """Name of the move that a row is of."""
    return f"{row['peft']}: {row['source']} -> {row['target']}"


def render(result: dict[str, Any]) -> str:
    """The page: a table for each method."""
    rows = {name_of(row): row for row in result["moves"]}
    saved, total = result["steps"]
    parts = [HEAD]
    for peft in METHODS:
        parts.append(f"## peft={peft}, {ABOUT[peft]}\n\n{_summary(peft, result)}\n")
        parts.append(f"| | {' | '.join(map(str, POINTS))} |\n|---{'|---' * len(POINTS)}|")
        for source in POINTS:
            shown = " | ".join(show(rows.get(f"{peft}: {source} -> {to}")) for to in POINTS)
            parts.append(f"| {source} | {shown} |")
        parts.append("")
    listed = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts.append(f"Saved after step {saved} of {total}, in fp32, with AdamW. Made with {listed}.")
    return "\n".join(parts) + "\n"


def _summary(peft: str, result: dict[str, Any]) -> str:
    rows = [row for row in result["moves"] if row["peft"] == peft]
    held = [row for row in rows if not row["problems"]]
    worst = max((row["loss"] for row in held), default=0.0)
    run = f"{len(held)} of {len(rows)} moves that were run hold"
    return f"{run}; the largest difference of a loss is {worst:.0e}."


def show(row: dict[str, Any] | None) -> str:
    """A cell of the table."""
    if row is None:
        return "not run"
    if row["problems"]:
        return "FAILS"
    return f"{row['loss']:.0e}" if row["loss"] else "0"
