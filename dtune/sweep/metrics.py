"""What metrics.jsonl says of a trial, read as it grows. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtune.checkpoint.schema import Best
from dtune.config.run import RunConfig

TRAIN_LOSS = "train_loss"
MINIMIZE, MAXIMIZE = "minimize", "maximize"


@dataclass(frozen=True)
class Objective:
    """The number that decides which trial is better."""

    metric: str
    """``loss`` or ``exact_match`` on held-out rows, or ``train_loss`` where there are none."""
    direction: str

    @property
    def sign(self) -> int:
        """Times a value: smaller is better."""
        return -1 if self.direction == MAXIMIZE else 1

    @property
    def title(self) -> str:
        """The metric as people say it."""
        return {TRAIN_LOSS: "train loss", "loss": "held-out loss"}.get(
            self.metric, self.metric.replace("_", " ")
        )


def objective_of(run: RunConfig) -> Objective:
    """Follows from the settings alone, so that it is the same for every state of a trial."""
    if run.data.eval_path == "none":
        return Objective(TRAIN_LOSS, MINIMIZE)
    best = run.checkpoint.best
    return Objective(best.value, MAXIMIZE if best is Best.exact_match else MINIMIZE)


@dataclass(frozen=True)
class Scores:
    """What a trial has come to so far. Numbers are None where it did not get that far."""

    loss: float | None = None
    """On held-out rows, of the best evaluation after the start."""
    exact_match: float | None = None
    """Of the same evaluation."""
    train_loss: float | None = None
    """Of the last step that was logged."""
    tokens_per_second: float | None = None
    """Of the last step that was logged."""
    step: int = 0
    """Of the last row."""

    def value(self, objective: Objective) -> float | None:
        """The number that the objective is about."""
        values = {"loss": self.loss, "exact_match": self.exact_match, TRAIN_LOSS: self.train_loss}
        return values[objective.metric]


@dataclass
class MetricsTail:
    """The rows of one metrics.jsonl that a sweep is about; `update` reads what has been added."""

    path: Path
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Rows of evaluations after the start."""
    _trained: list[tuple[int, float | None, float | None]] = field(default_factory=list)
    _step: int = 0
    _offset: int = 0

    def update(self) -> MetricsTail:
        """Read what was appended; without a file there is nothing."""
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            return self
        if size < self._offset:  # Another run's: the old one was set aside.
            self._offset, self._step = 0, 0
            self.evaluations, self._trained = [], []
        if size > self._offset:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]  # A run is writing the rest.
            self._offset += len(whole)
            for line in whole.splitlines():
                self._take(json.loads(line))
        return self

    def _take(self, row: dict[str, Any]) -> None:
        kind, step = row["kind"], int(row["step"])
        if kind == "resume":  # Later rows replace those after this step.
            self.evaluations = [one for one in self.evaluations if one["step"] <= step]
            self._trained = [one for one in self._trained if one[0] <= step]
        elif kind == "eval" and step > 0:
            self.evaluations.append(row)
        elif kind == "train":
            self._trained.append((step, row["loss"], row.get("tokens_per_second")))
        self._step = step

    def scores(self, objective: Objective) -> Scores:
        """The best evaluation by the objective, and the last step of training."""
        metric = objective.metric
        told = [row for row in self.evaluations if row.get(metric) is not None]
        best = min(told, key=lambda row: objective.sign * row[metric], default={})
        losses = [loss for _, loss, _ in self._trained if loss is not None]
        return Scores(
            loss=best.get("loss"),
            exact_match=best.get("exact_match"),
            train_loss=losses[-1] if losses else None,
            tokens_per_second=self._trained[-1][2] if self._trained else None,
            step=self._step,
        )


def read_scores(folder: Path, objective: Objective) -> Scores:
    """What the metrics of a run folder come to."""
    return MetricsTail(folder / "metrics.jsonl").update().scores(objective)
