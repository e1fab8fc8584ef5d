"""The folder of a case: what the process that starts it and its ranks tell each other."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dtune.bench.record import Origin, Setting, Status
from dtune.bench.schema import BenchConfig, WeightsFrom

CASE = "case.json"
RESULT = "result.jsonl"
ORIGIN = "origin.json"


@dataclass(frozen=True)
class CaseFile:
    """A case as its ranks need it, beside the frozen config of its run."""

    label: str
    repeat: int
    command: tuple[str, ...]
    settings: Mapping[str, Setting]
    bench: BenchConfig


@dataclass(frozen=True)
class Failure:
    """How a rank ended that could not measure."""

    status: Status
    reason: str
    time: float
    """Seconds since 1970: the first failure is the cause of the others."""


def write_case(folder: Path, case: CaseFile) -> None:
    """Write what `read_case` reads."""
    (folder / CASE).write_text(json.dumps(asdict(case), indent=1) + "\n", encoding="utf-8")


def read_case(folder: Path) -> CaseFile:
    """The case of a folder that `write_case` wrote into."""
    raw = json.loads((folder / CASE).read_text(encoding="utf-8"))
    bench = {**raw["bench"], "weights": WeightsFrom(raw["bench"]["weights"])}
    return CaseFile(**{**raw, "command": tuple(raw["command"]), "bench": BenchConfig(**bench)})


def write_origin(folder: Path, origin: Origin) -> None:
    """Write where the case is measured, for a row of it even if its processes are killed."""
    (folder / ORIGIN).write_text(json.dumps(asdict(origin)) + "\n", encoding="utf-8")


def read_origin(folder: Path) -> Origin | None:
    """What `write_origin` wrote; None where no process came so far."""
    path = folder / ORIGIN
    if not path.is_file():
        return None
    raw = json.loads(path.read_text(encoding="utf-8"))
    return Origin(**{**raw, "command": tuple(raw["command"])})


def write_failure(folder: Path, failure: Failure) -> None:
    """Write how this rank ended."""
    path = folder / f"failure-{os.environ.get('RANK', '0')}.json"
    path.write_text(json.dumps(asdict(failure)) + "\n", encoding="utf-8")


def first_failure(folder: Path) -> Failure | None:
    """How the first rank ended that ended badly; one that is out of memory before all others.

    A rank that loses another one may notice it before that has said why it went.
    """
    found = [
        Failure(Status(raw["status"]), raw["reason"], raw["time"])
        for path in folder.glob("failure-*.json")
        for raw in [json.loads(path.read_text(encoding="utf-8"))]
    ]
    by_cause = sorted(found, key=lambda one: (one.status is not Status.oom, one.time))
    return by_cause[0] if by_cause else None
