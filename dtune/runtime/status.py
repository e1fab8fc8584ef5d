"""How a run stands, in ``RUN/status.json``: what launchers and batch scripts decide by.

torchrun flattens the exit codes of its workers, so the truth travels in this file. The first
failure wins: what other ranks report afterwards is its echo.
"""

from __future__ import annotations

import json
import os
import secrets
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
    hung = "hung"


FAILURES = frozenset({State.failed, State.config_error, State.diverged, State.hung})

EXIT_CODES = {
    State.done: 0,
    State.running: 1,
    State.failed: 1,
    State.diverged: 1,
    State.hung: 1,
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
    """Of a failure; -1 where no rank is to blame more than others."""
    message: str = ""
    section: str = ""
    """What a run that hung was at: start, step, save or evaluation."""
    traceback: str = ""
    """Of a failure that is nobody's mistake of a setting."""
    hopeless: bool = False
    """Of a failure: whether ranks that are started again would only come to the same."""
    time: float = 0.0
    """Seconds since the epoch."""


def write_status(
    run_dir: str | Path, status: Status, *, instead: bool = False, since: float = 0.0
) -> None:
    """Replace the status, unless it already tells of a failure of this attempt.

    ``instead``: also then, if it is of the same rank. ``since``: when this attempt began; a
    failure that was told before is none of its own.

    Atomic, except where the disk is full: then it is written over in the room that it has.
    """
    path = Path(run_dir) / "status.json"
    if status.state is not State.running and path.is_file():
        # A damaged one, as a full disk leaves it, tells of nothing.
        before, _ = status_of(run_dir)
        # What fails after a rank was preempted has only lost it.
        lost = before.state is State.preempted and status.state in FAILURES
        final = (before.state in FAILURES and before.time >= since) or lost
        if final and not (instead and before.rank == status.rank):
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {**asdict(status), "state": status.state.value, "time": time.time()}
    temporary = path.with_name(f".status-{os.getpid()}-{secrets.token_hex(4)}.json")
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


def status_of(run_dir: str | Path) -> tuple[Status, str]:
    """What status.json says, running where it is absent or damaged; and what is wrong with it."""
    try:
        return read_status(run_dir), ""
    except FileNotFoundError:
        return Status(State.running), ""
    except (ValueError, TypeError, KeyError) as error:
        damage = f"{Path(run_dir) / 'status.json'} cannot be read: {error}"
        return Status(State.running, rank=-1, message=damage), damage
