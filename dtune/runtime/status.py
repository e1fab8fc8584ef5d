"""How a run stands, in ``RUN/status.json``: what launchers and batch scripts decide by.

torchrun flattens the exit codes of its workers, so the truth travels in this file. The first
failure wins: what other ranks report afterwards is its echo.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path


class State(Enum):
    """How a run stands."""

    running = "running"
    done = "done"
    preempted = "preempted"
    failed = "failed"
    config_error = "config_error"
    diverged = "diverged"


FAILURES = frozenset({State.failed, State.config_error, State.diverged})

EXIT_CODES = {
    State.done: 0,
    State.running: 1,
    State.failed: 1,
    State.diverged: 1,
    State.config_error: 2,
    State.preempted: 75,
}
"""Exit code of ``dtune`` by state; still ``running`` after the end is a failure."""


@dataclass(frozen=True)
class Status:
    """Contents of status.json."""

    state: State
    step: int = 0
    rank: int = 0
    message: str = ""
    time: float = 0.0
    """Seconds since the epoch."""


def write_status(run_dir: str | Path, status: Status) -> None:
    """Replace the status, unless it already tells of a failure of this attempt.

    Atomic, except where the disk is full: then it is written over in the room that it has.
    """
    path = Path(run_dir) / "status.json"
    if status.state is not State.running and path.is_file():
        before = read_status(run_dir)
        if before.state in FAILURES:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {**asdict(status), "state": status.state.value, "time": time.time()}
    temporary = path.with_name(f".status-{os.getpid()}.json")
    text = json.dumps(record, indent=1) + "\n"
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        with path.open("r+", encoding="utf-8") as file:
            file.write(text)
            file.truncate()


def read_status(run_dir: str | Path) -> Status:
    """The status of a run folder; FileNotFoundError if the run never started."""
    record = json.loads((Path(run_dir) / "status.json").read_text(encoding="utf-8"))
    return Status(**{**record, "state": State(record["state"])})
