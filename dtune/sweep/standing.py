"""How each trial of a sweep stands, from its folder alone, and the table that says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtune.errors import ConfigError
from dtune.runtime.lock import check_free
from dtune.runtime.status import State, status_of
from dtune.sweep.folder import (
    SweepRecord,
    TrialRecord,
    label_of,
    read_sweep,
    read_trials,
)
from dtune.sweep.metrics import MetricsTail, Objective, Scores

NOT_STARTED, QUEUED, PRUNED, UNKNOWN = "not started", "queued", "pruned", "unknown"
RUNNING, DONE = State.running.value, State.done.value
STOPPED = frozenset({NOT_STARTED, QUEUED, State.preempted.value})
"""States of a trial that nothing is wrong with and that is not at its end."""


@dataclass(frozen=True)
class Standing:
    """How a trial stands."""

    number: int
    label: str
    """The settings that differ between trials."""
    settings: Mapping[str, str]
    state: str
    """That of status.json, or ``not started``, ``queued``, ``pruned``, or ``unknown`` where SLURM
    does not answer."""
    message: str
    scores: Scores
    value: float | None
    """Of the objective, best so far."""
    folder: Path

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes of it as it is."""
        return self.state not in (NOT_STARTED, QUEUED, RUNNING, UNKNOWN)


class SweepView:
    """A sweep as its folder tells it; reads only what has been added since the last look."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record: SweepRecord = read_sweep(folder)
        self._tails: dict[Path, MetricsTail] = {}

    def look(self) -> list[Standing]:
        """How every trial stands now, by number."""
        trials = read_trials(self.folder)
        jobs = [trial.attempts[-1].job for _, trial in trials if trial.attempts]
        queue = _ask_queue([job for job in jobs if job])
        starting = _is_held(self.folder)
        return [self._stand(folder, trial, queue, starting) for folder, trial in trials]

    def is_at_work(self, standings: Sequence[Standing]) -> bool:
        """Whether more comes of the sweep by itself."""
        works = any(one.state in (QUEUED, RUNNING, UNKNOWN) for one in standings)
        return works or _is_held(self.folder)

    def look_at(self, folder: Path, trial: TrialRecord) -> Standing:
        """How a trial of this machine stands that this process has started, or has seen end."""
        return self._stand(folder, trial, {}, True)

    def _stand(
        self, folder: Path, trial: TrialRecord, queue: Mapping[str, str], starting: bool
    ) -> Standing:
        objective = self.record.objective
        tail = self._tails.setdefault(folder, MetricsTail(folder / "metrics.jsonl"))
        scores = tail.update().scores(objective)
        state, message = _state_of(folder, trial, queue, starting)
        return Standing(
            number=trial.number,
            label=label_of(trial, self.record.swept),
            settings=trial.settings,
            state=state,
            message=message,
            scores=scores,
            value=scores.value(objective),
            folder=folder,
        )

    def evaluations(self, folder: Path) -> Sequence[Mapping[str, Any]]:
        """Rows of the held-out evaluations of a trial so far."""
        tail = self._tails.setdefault(folder, MetricsTail(folder / "metrics.jsonl"))
        return tail.update().evaluations


def _state_of(
    folder: Path, trial: TrialRecord, queue: Mapping[str, str], starting: bool
) -> tuple[str, str]:
    """State and message of a trial."""
    if not trial.attempts:
        return NOT_STARTED, ""
    status, damage = status_of(folder)
    if status.state is State.preempted and trial.pruned is not None:
        return PRUNED, trial.pruned.why
    job = trial.attempts[-1].job
    # A job that has saved is requeued, and its status is that of before until it starts again.
    if job in queue and status.state in (State.running, State.preempted):
        return queue[job], f"job {job}"
    if status.state is not State.running:
        return status.state.value, status.message
    if not job and (starting or _is_held(folder)):
        return RUNNING, ""
    what = f"job {job} is over" if job else "its processes are gone"
    why = damage or "nothing says why"
    return State.failed.value, f"{what}, and {why}; logs: {folder / 'logs'}"


def _is_held(folder: Path) -> bool:
    """Whether a living process works in a folder."""
    try:
        check_free(folder)
    except ConfigError:
        return True
    return False


def _ask_queue(jobs: Sequence[str]) -> dict[str, str]:
    """State in SLURM of those jobs that it knows of and that are not over."""
    if not jobs:
        return {}
    from dtune.sweep.slurm import ask_queue

    return ask_queue(jobs)


_NUMBERS = ("held-out loss", "exact match", "train loss", "tokens/s")


def table_of(standings: Sequence[Standing]) -> str:
    """The trials as lines of text, one each."""
    rows = [("trial", "settings", "state", "step", *_NUMBERS, "folder")]
    for one in standings:
        scores = one.scores
        cells = (
            _cell(scores.loss, ".4f"),
            _cell(scores.exact_match, ".1%"),
            _cell(scores.train_loss, ".4f"),
            _cell(scores.tokens_per_second, ",.0f"),
        )
        step = str(scores.step) if scores.step else "-"
        rows.append((str(one.number), one.label, one.state, step, *cells, str(one.folder)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:], ""])


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def line_of(standing: Standing, objective: Objective) -> str:
    """One line of text about a trial that has ended; a second and third where it failed."""
    value = "" if standing.value is None else f"  {objective.title} {standing.value:.4f}"
    line = f"trial {standing.number}  {standing.state}  {standing.label}{value}"
    if standing.state in (DONE, PRUNED, State.preempted.value):
        return line
    first = standing.message.splitlines()[0] if standing.message else "no message"
    return f"{line}\n  {first}\n  log: {standing.folder / 'logs'}"


def exit_code_of(standings: Sequence[Standing]) -> int:
    """1 where a trial failed, 75 where one is left to be gone on with, else 0."""
    over = {one.state for one in standings} - {DONE, PRUNED}
    if over - STOPPED - {RUNNING}:
        return 1
    return 75 if over else 0
