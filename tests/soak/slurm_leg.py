"""What only a batch system does to a run: its real time limit, and a node that is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.slurm.cluster import missing_tools, one_host_cluster
from tests.slurm.faults import Ended, differences, finish, lose_node, reach_time_limit, start_whole
from tests.slurm.shape import Shape
from tests.slurm.training import EVERY, HOLD_AT, steps_of
from tests.soak.course import Endured

# Seconds until SLURM takes a node that says nothing for down.
_SILENT = 20
FAULTS: dict[str, Callable[..., Ended]] = {
    "the time limit of SLURM": reach_time_limit,
    "kill -9 of slurmd and all on its node": partial(lose_node, kill=True),
}


def why_not() -> str:
    """Why there is no SLURM here; empty where there is."""
    missing = missing_tools()
    return f"{', '.join(missing)} not installed" if missing else ""


def endure_slurm(folder: Path) -> list[Endured]:
    """A job for each fault, compared to one that is left alone."""
    results = []
    with one_host_cluster(Shape(node_timeout=_SILENT)) as cluster:
        started = time.monotonic()
        for name in ("whole", *FAULTS):
            (folder / name.replace(" ", "-")).mkdir(parents=True)
        run_dir = folder / "whole" / "run"
        whole = finish(cluster, start_whole(cluster, run_dir), run_dir)
        for name, fault in FAULTS.items():
            ended = fault(cluster, folder / name.replace(" ", "-") / "run")
            result = Endured("lora, ddp, 2 nodes of SLURM", launches=1, attempts=ended.restarts)
            result.faults = [{"kind": name, "seconds": ended.seconds, "step": HOLD_AT}]
            result.problems = differences(ended, whole)
            # Its newest checkpoint is of the step before the fault, or one interval older.
            saved = steps_of(ended.run_dir, "resume")
            result.checkpoints_lost = sum(step < HOLD_AT - EVERY for step in saved)
            result.seconds = time.monotonic() - started
            started = time.monotonic()
            results.append(result)
    return results
