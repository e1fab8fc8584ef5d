"""How a run stands, for the commands that ask after runs and stop them. Imports no torch."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dtune_launch.record import JobRecord, read_record
from dtune_launch.slurm_queries import ALIVE, job_state

from dtune.errors import ConfigError
from dtune.runtime.lock import LOCK, STALE_SECONDS
from dtune.runtime.processes import Holder, is_alive, job_is_over, this_machine
from dtune.runtime.status import State, Status, status_of

# Enough for many rows, and little for a file of gigabytes.
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Standing:
    """How a run stands."""

    folder: Path
    state: str
    """A state of status.json, or what is known better: not started, waiting, killed, silent."""
    status: Status
    job: JobRecord | None
    job_state: str
    """How Slurm says that the job stands; empty without one."""
    holders: tuple[Holder, ...]
    """Processes that work in the folder, as far as can be told."""

    @property
    def is_alive(self) -> bool:
        """Whether it may still write."""
        return self.state in ("waiting", "running", "silent")


class Parser(argparse.ArgumentParser):
    """Answers wrong arguments as dtune does."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")


def parser(name: str, description: str, *, several: bool = False) -> Parser:
    """A parser of a command on runs, which takes ``RUN`` and ``run_dir=RUN``."""
    made = Parser(prog=f"dtune {name}", description=description)
    what = "folder of a run, or of a sweep" if several else "folder of a run"
    made.add_argument("runs", metavar="RUN", nargs="+" if several else 1, help=what)
    return made


def find_runs(names: Sequence[str]) -> list[Path]:
    """The folders of runs that are named, or lie in one that is; ConfigError if there is none."""
    found: list[Path] = []
    for name in names:
        folder = Path(name.removeprefix("run_dir=")).expanduser().absolute()
        if not folder.is_dir():
            raise ConfigError(f"{folder}: there is no such folder")
        inside = [folder] if is_run(folder) else _by_number(folder)
        if not inside:
            raise ConfigError(f"{folder} is not the folder of a run, nor does it hold any")
        found += inside
    return found


def find_run(name: str) -> Path:
    """The folder of one run; ConfigError if it is none."""
    folders = find_runs([name])
    if len(folders) > 1 or not is_run(Path(name.removeprefix("run_dir=")).expanduser()):
        raise ConfigError(f"{name} holds several runs; name one of them, such as {folders[0]}")
    return folders[0]


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return any((folder / name).is_file() for name in ("status.json", "config.yaml", "job.json"))


def _by_number(folder: Path) -> list[Path]:
    runs = [path for path in folder.iterdir() if path.is_dir() and is_run(path)]
    return sorted(runs, key=lambda path: (not path.name.isdecimal(), len(path.name), path.name))


def read_standing(folder: Path) -> Standing:
    """How a run stands by its files, its processes on this machine, and Slurm."""
    status, _ = status_of(folder)
    job = read_record(folder)
    working = status.state is State.running
    of_job = job_state(job.job_id) if job and working else ""
    holders = read_holders(folder)
    return Standing(
        folder=folder,
        state=_of_running(folder, of_job, holders) if working else status.state.value,
        status=status,
        job=job,
        job_state=of_job,
        holders=holders,
    )


def _of_running(folder: Path, of_job: str, holders: tuple[Holder, ...]) -> str:
    """What a run is whose status.json says that it runs, or is not there yet."""
    if of_job.startswith(ALIVE):
        return "running" if of_job.startswith("RUNNING") else "waiting"
    # Not by a job that is over: the folder may have been gone on with elsewhere since.
    if any(holder.machine == this_machine() for holder in holders):
        return "running"
    if any(not job_is_over(holder.job) for holder in holders):
        try:
            beat = time.time() - (folder / LOCK).stat().st_mtime
        except FileNotFoundError:  # It has just ended.
            return "killed"
        return "running" if beat < STALE_SECONDS else "silent"
    has_started = bool(of_job) or (folder / "status.json").is_file()
    return "killed" if has_started else "not started"


def read_holders(folder: Path) -> tuple[Holder, ...]:
    """Processes of a run that are alive, the one that the others come from first.

    Those of other machines are taken to be alive.
    """
    try:
        text = (folder / LOCK).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    found = [
        Holder(**{**holder, "attempt": tuple(holder["attempt"])})
        for holder in json.loads(text)["holders"]
    ]
    return tuple(holder for holder in found if is_alive(holder))


def last_rows(folder: Path) -> dict[str, dict[str, Any]]:
    """The last row of each kind among the last ones of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode("utf-8", errors="replace").splitlines(keepends=True)
    rows: dict[str, dict[str, Any]] = {}
    for line in lines:
        # The first may be cut by us, the last by a run that is writing it.
        if line.startswith("{") and line.endswith("}\n"):
            row = json.loads(line)
            rows[row["kind"]] = row
    return rows


def named_checkpoints(folder: Path) -> dict[str, str]:
    """Names of the newest and the best checkpoint, where they are."""
    found = {}
    for name in ("LATEST", "BEST"):
        path = folder / "checkpoints" / name
        if path.is_file():
            found[name] = path.read_text(encoding="utf-8").strip()
    return found
