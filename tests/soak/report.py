"""The report of a soak: JSON with all of it, and a page of Markdown beside it."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tests.soak.run import Soak


_PLACES = ("out", "page")


def write_report(soak: Soak, *, started: float, loads: list[float]) -> bool:
    """Write both; whether nothing was lost and nothing is left."""
    legs = soak.legs
    problems = [problem for leg in legs for problem in leg.problems]
    record = {
        "ok": not problems and all(soak.clean_restarts) and soak.kills == soak.options.kills,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(started)),
        "minutes": round((time.time() - started) / 60, 1),
        "options": asdict(soak.options),
        "machine": {
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "load_average_at_start_and_end": [round(load, 1) for load in loads],
        },
        "kills_of_those_asked_for": [soak.kills, soak.options.kills],
        "faults": sum(len(leg.faults) for leg in legs),
        "by_kind": by_kind(soak),
        "runs": len(legs),
        "launches": sum(leg.launches for leg in legs),
        "gone_on_from_a_checkpoint": sum(leg.attempts for leg in legs),
        "checkpoints_lost": sum(leg.checkpoints_lost for leg in legs),
        "runs_equal_to_the_one_left_alone": sum(not leg.problems for leg in legs),
        "clean_restarts": [sum(soak.clean_restarts), len(soak.clean_restarts)],
        "problems": problems,
        "left_alone_seconds": {name: round(it.seconds, 1) for name, it in soak.wholes.items()},
        "legs": [asdict(leg) for leg in legs],
    }
    texts = {soak.options.out: json.dumps(record, indent=1) + "\n", soak.options.page: page(record)}
    for name, text in texts.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
    return bool(record["ok"])


def by_kind(soak: Soak) -> dict[str, dict[str, Any]]:
    """How often each fault came, and the seconds until the next step was done."""
    faults = [fault for leg in soak.legs for fault in leg.faults]
    counts = Counter(fault["kind"] for fault in faults)
    found = {}
    for kind in sorted(counts):
        seconds = [it["seconds"] for it in faults if it["kind"] == kind and it["seconds"]]
        found[kind] = {
            "times": counts[kind],
            "median_seconds_to_next_step": round(statistics.median(seconds), 1)
            if seconds
            else None,
        }
    return found


def page(record: dict[str, Any]) -> str:
    """The report for people."""
    machine, options = record["machine"], record["options"]
    given = " ".join(f"{name}={value}" for name, value in options.items() if name not in _PLACES)
    first, last = machine["load_average_at_start_and_end"]
    lines = [
        "# Soak",
        "",
        "Written by `make soak`: the same command starts a run again, whatever was done to "
        "it, until it is done; then all of its state is compared to that of a run that was left "
        f"alone. All numbers, fault by fault, are in `{options['out']}`.",
        "",
        f'`make soak ARGS="{given}"` on '
        f"{machine['cpus']} CPU cores, Python {machine['python']}, torch {machine['torch']}, "
        f"{record['started']}, {record['minutes']} minutes. The load average was {first} at the "
        f"start and {last} at the end.",
        "",
        f"{record['faults']} faults in {record['runs']} runs. "
        f"Checkpoints lost: {record['checkpoints_lost']}. Runs that ended with the very state, "
        f"weights and metrics of the run that was left alone: "
        f"{record['runs_equal_to_the_one_left_alone']} of {record['runs']}. Kills at random: "
        f"{' of '.join(map(str, record['kills_of_those_asked_for']))}. Clean restarts in "
        f"one attempt: {record['clean_restarts'][0]} of {record['clean_restarts'][1]}.",
        "",
        "| fault | times | median seconds to the next step |",
        "|---|---|---|",
    ]
    for kind, facts in record["by_kind"].items():
        seconds = facts["median_seconds_to_next_step"]
        lines.append(f"| {kind} | {facts['times']} | {'-' if seconds is None else seconds} |")
    lines += ["", "Every start was the same command. Problems:", ""]
    lines += [f"- {problem}" for problem in record["problems"]] or ["none."]
    return "\n".join(lines) + "\n"
