"""``dtune status``: how runs stand."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from dtune.commands.running import (
    Standing,
    find_runs,
    last_rows,
    named_checkpoints,
    parser,
    read_standing,
)

_DESCRIPTION = "How runs stand: one in full, several, or those of a sweep, in a line each."


def run(argv: list[str]) -> int:
    """Print how the runs stand."""
    options = parser("status", _DESCRIPTION, several=True).parse_args(argv)
    folders = find_runs(options.runs)
    standings = [read_standing(folder) for folder in folders]
    sys.stdout.write(_page(standings[0]) if len(folders) == 1 else _table(standings))
    return 0


def _page(it: Standing) -> str:
    rows = last_rows(it.folder)
    lines = [("run", str(it.folder)), ("state", _state(it))]
    if it.status.message:
        of_rank = f"rank {it.status.rank}: " if it.status.rank >= 0 else ""
        lines.append(("message", f"{of_rank}{it.status.message}"))
    if it.job is not None:
        lines.append(("job", f"{it.job.job_id} {it.job_state}".rstrip()))
    lines += [("process", holder.describe()) for holder in it.holders]
    for kind in ("train", "eval"):
        if kind in rows:
            lines.append((f"last {kind}", _numbers(rows[kind])))
    marked = {"LATEST": "newest", "BEST": "best"}
    lines += [(marked[name], step) for name, step in named_checkpoints(it.folder).items()]
    lines.append(("logs", str(it.folder / "logs")))
    return "".join(f"{name:<11}{value}\n" for name, value in lines)


def _state(it: Standing) -> str:
    known = {
        "killed": "killed: its processes are gone and have not said why",
        "silent": "silent: its processes, on another machine, have not shown life for minutes",
        "waiting": "waiting for nodes",
    }
    said = known.get(it.state, it.state)
    if it.status.time and it.state != "running":
        said += f" since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(it.status.time))}"
    return f"{said}, step {_step(it)}"


def _step(it: Standing) -> int:
    """The step that the run has done, as far as is written."""
    row = last_rows(it.folder).get("train", {})
    return max(it.status.step, int(row.get("step", 0))) if it.is_alive else it.status.step


def _numbers(row: dict[str, Any]) -> str:
    """A row of metrics.jsonl in one line."""
    parts = [f"step {row['step']}"]
    for name, form in (
        *(("loss", ".4f"), ("exact_match", ".1%"), ("lr", ".3g"), ("grad_norm", ".2f")),
        ("tokens_per_second", ",.0f"),
    ):
        if isinstance(row.get(name), int | float):
            parts.append(f"{name} {row[name]:{form}}")
    return ", ".join(parts)


def _table(standings: list[Standing]) -> str:
    table = [("run", "state", "step", "loss", "job")]
    for it in standings:
        loss = last_rows(it.folder).get("train", {}).get("loss")
        job = f"{it.job.job_id} {it.job_state}".rstrip() if it.job else ""
        table.append(
            (_short(it.folder), it.state, str(_step(it)), f"{loss:.4f}" if loss else "-", job)
        )
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    return "\n".join(lines) + "\n"


def _short(folder: Path) -> str:
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
