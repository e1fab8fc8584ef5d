"""Open files of the processes of a run, over their lives: what grows is a leak."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.injection import processes_of, workers_of

GROWTH = 4
"""Open files by which a process may have more in the last third of its life than in the first."""
_LEAST_LOOKS = 6


@dataclass
class OpenFiles:
    """How many every process had, look by look."""

    counts: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    """By name (agent, rank 0, ...) and process."""

    def note(self, seen: Mapping[tuple[str, int], int]) -> None:
        """Add a look at the processes that live now."""
        for process, count in seen.items():
            self.counts.setdefault(process, []).append(count)

    def span(self) -> dict[str, list[int]]:
        """Least and most by name."""
        spans: dict[str, list[int]] = {}
        for (name, _), counts in self.counts.items():
            low, high = spans.get(name, [counts[0], counts[0]])
            spans[name] = [min(low, *counts), max(high, *counts)]
        return spans

    def leaks(self) -> list[str]:
        """Processes whose least number has grown; what is open for a moment does not count."""
        found = []
        for (name, pid), counts in self.counts.items():
            third = len(counts) // 3
            if len(counts) < _LEAST_LOOKS:
                continue
            first, last = min(counts[:third]), min(counts[-third:])
            if last - first > GROWTH:
                found.append(
                    f"{name} (process {pid}) leaks open files: from {first} to {last} in "
                    f"{len(counts)} looks"
                )
        return found


def count_open(run_dir: Path) -> dict[tuple[str, int], int]:
    """Open files of the agent and of each rank that live now."""
    workers = {pid: f"rank {rank}" for rank, pid in workers_of(run_dir).items()}
    counts = {}
    for pid, arguments in processes_of(run_dir).items():
        name = "agent" if "dtune_launch.agent" in arguments else workers.get(pid)
        if name is not None:
            with contextlib.suppress(OSError):
                counts[name, pid] = len(os.listdir(f"/proc/{pid}/fd"))
    return counts
