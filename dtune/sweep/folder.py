"""The folder of a sweep: ``sweep.yaml``, and a run folder with a ``trial.json`` for each trial.

Every launcher and every sweeper writes these two files and no other of its own, so that whatever
started a sweep, the same commands tell how it stands and go on with it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dtune.errors import ConfigError
from dtune.runtime.files import publish_text
from dtune.sweep.metrics import Objective

SWEEP_FILE = "sweep.yaml"
TRIAL_FILE = "trial.json"
FORMAT = 1


@dataclass(frozen=True)
class SweepRecord:
    """Contents of sweep.yaml."""

    command: tuple[str, ...]
    """Arguments of ``dtune train``."""
    directory: str
    """Working directory of that command."""
    swept: Mapping[str, str]
    """Keys that differ between trials, each with its values as they were given."""
    objective: Objective
    launcher: Mapping[str, Any]
    """Settings of ``hydra.launcher``."""
    searchpath: tuple[str, ...] = ()
    """Folders of options beside those of dtune."""
    created: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))


@dataclass(frozen=True)
class Attempt:
    """One start of a trial: a process of a machine, or a job of SLURM."""

    started: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    job: str = ""
    """Id in SLURM, ``<array>_<element>``; empty for a process of a machine."""


@dataclass(frozen=True)
class Pruned:
    """Why a trial was asked to stop before its end."""

    step: int
    value: float
    why: str


@dataclass(frozen=True)
class TrialRecord:
    """Contents of trial.json."""

    number: int
    overrides: tuple[str, ...]
    choices: Mapping[str, str]
    """Option of every group."""
    attempts: tuple[Attempt, ...] = ()
    pruned: Pruned | None = None

    @property
    def settings(self) -> dict[str, str]:
        """Value by key, as people write both."""
        pairs = (override.lstrip("+~").partition("=") for override in self.overrides)
        return {key: plain(value) for key, _, value in pairs}


def plain(value: str) -> str:
    """A value without the quotes and the escapes of Hydra's grammar."""
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        return value[1:-1]
    return re.sub(r"\\(.)", r"\1", value)


def label_of(trial: TrialRecord, swept: Mapping[str, str]) -> str:
    """The settings of a trial that differ between trials; all where nothing differs."""
    shown = {key: value for key, value in trial.settings.items() if key in swept}
    return " ".join(f"{key}={value}" for key, value in (shown or trial.settings).items())


def write_sweep(folder: Path, record: SweepRecord) -> None:
    """Write sweep.yaml, and the folder if it is not there."""
    text = yaml.safe_dump(
        {"format": FORMAT, **_plain_data(dataclasses.asdict(record))}, sort_keys=False
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        publish_text(folder / SWEEP_FILE, text)
    except OSError as error:
        raise ConfigError(f"hydra.sweep.dir={folder} cannot be written: {error}") from error


def read_sweep(folder: Path) -> SweepRecord:
    """The record of a sweep; ConfigError where the folder is none of a sweep."""
    path = folder / SWEEP_FILE
    if not path.is_file():
        near = folder.parent / SWEEP_FILE
        hint = f"; did you mean {folder.parent}?" if near.is_file() else ""
        raise ConfigError(f"{folder} holds no {SWEEP_FILE}: it is not the folder of a sweep{hint}")
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    if raw.pop("format") != FORMAT:
        raise ConfigError(f"{path} was written by another version of dtune")
    return SweepRecord(
        **{
            **raw,
            "command": tuple(raw["command"]),
            "searchpath": tuple(raw["searchpath"]),
            "objective": Objective(**raw["objective"]),
        }
    )


def write_trial(folder: Path, record: TrialRecord) -> None:
    """Write trial.json into the run folder of the trial."""
    publish_text(folder / TRIAL_FILE, json.dumps(dataclasses.asdict(record), indent=1) + "\n")


def read_trial(folder: Path) -> TrialRecord:
    """The record of a trial, by its run folder."""
    raw = json.loads((folder / TRIAL_FILE).read_text(encoding="utf-8"))
    attempts = tuple(Attempt(**one) for one in raw["attempts"])
    pruned = Pruned(**raw["pruned"]) if raw["pruned"] else None
    overrides = tuple(raw["overrides"])
    return TrialRecord(**{**raw, "overrides": overrides, "attempts": attempts, "pruned": pruned})


def read_trials(sweep: Path) -> list[tuple[Path, TrialRecord]]:
    """Run folder and record of every trial, by number."""
    found = [(path.parent, read_trial(path.parent)) for path in sweep.glob(f"*/{TRIAL_FILE}")]
    return sorted(found, key=lambda pair: pair[1].number)


def add_attempt(folder: Path, attempt: Attempt) -> None:
    """Record that a trial has been started once more; what it was pruned for is over."""
    record = read_trial(folder)
    attempts = (*record.attempts, attempt)
    write_trial(folder, dataclasses.replace(record, attempts=attempts, pruned=None))


def mark_pruned(folder: Path, pruned: Pruned) -> None:
    """Record why a trial is about to be asked to stop."""
    write_trial(folder, dataclasses.replace(read_trial(folder), pruned=pruned))


def _plain_data(value: Any) -> Any:
    """Without tuples, which YAML would name."""
    if isinstance(value, Mapping):
        return {str(key): _plain_data(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain_data(one) for one in value]
    return value
