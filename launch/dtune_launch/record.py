"""``RUN/job.json``: the cluster's job of a run, so that it can be asked after and be stopped."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD = "job.json"


@dataclass(frozen=True)
class JobRecord:
    """Contents of job.json."""

    launcher: str
    job_id: str
    """Of an element of an array ``<array>_<element>``, which means that element alone."""
    script: str = ""
    """Path of the job's script; empty where one was submitted by hand."""
    time: float = 0.0
    """Seconds since the epoch, when it was submitted."""


def write_record(run_dir: Path, record: JobRecord) -> None:
    """Replace the record of a run, at once and as a whole."""
    temporary = run_dir / f".{RECORD}-{os.getpid()}"
    temporary.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    temporary.replace(run_dir / RECORD)


def read_record(run_dir: Path) -> JobRecord | None:
    """The record of a run; None where it is of no job."""
    path = run_dir / RECORD
    if not path.is_file():
        return None
    return JobRecord(**json.loads(path.read_text(encoding="utf-8")))
