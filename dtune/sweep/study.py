"""A search: an Optuna study in the folder of a sweep, which chooses trials and ends hopeless ones.

The study is a journal beside the trials. What the search draws for a trial follows from the seed,
the number of the trial and what was known by then, so that a search which was interrupted goes on
as if it had not been.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from dtune.errors import ConfigError
from dtune.sweep.folder import Pruned
from dtune.sweep.metrics import TRAIN_LOSS, Objective
from dtune.sweep.space import Axis, Space, Words, write_overrides
from dtune.sweep.standing import DONE, PRUNED, STOPPED, Standing

STUDY_FILE = "study.journal"
_NAME = "sweep"
_NUMBER = "number"
"""User attribute: number of the trial in the sweep."""
_LEFT_OUT = -1


@dataclass(frozen=True)
class SearchSettings:
    """How a search chooses and prunes."""

    sampler: str
    seed: int
    startup_trials: int
    pruner: str
    prune_after_trials: int
    prune_after_step: int

    def __post_init__(self) -> None:
        for key, value, known in (
            ("sampler", self.sampler, ("tpe", "random")),
            ("pruner", self.pruner, ("median", "halving", "none")),
        ):
            if value not in known:
                raise ConfigError(f"hydra.sweeper.{key}={value} is not one of {', '.join(known)}")
        for key in ("startup_trials", "prune_after_trials", "prune_after_step"):
            if vars(self)[key] < 0:
                raise ConfigError(f"hydra.sweeper.{key}={vars(self)[key]} must be 0 or more")


@dataclass(frozen=True)
class Chosen:
    """A trial to run."""

    number: int
    overrides: list[str]


class Search:
    """Asks the study for trials, tells it how they went, and judges those that run."""

    def __init__(
        self, sweep: Path | None, space: Space, objective: Objective, settings: SearchSettings
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = space
        self._settings = settings
        self._distributions = {key: distribution_of(axis) for key, axis in space.items()}
        # Without held-out rows there is nothing that could be judged before the end.
        self._may_prune = objective.metric != TRAIN_LOSS and settings.pruner != "none"
        self._metric = objective.metric
        self._study = optuna.create_study(
            storage=None if sweep is None else _storage(sweep / STUDY_FILE),
            study_name=_NAME,
            direction=optuna.study.StudyDirection[objective.direction.upper()],
            pruner=_pruner(settings),
            load_if_exists=True,
        )
        self._running: dict[int, Trial] = {}
        self._reported: dict[int, int] = {}

    def numbers(self) -> set[int]:
        """Trials that the study knows."""
        return set(self._newest())

    def unfinished(self, *, pruned: bool) -> list[int]:
        """Trials without an end to learn from; with ``pruned`` those that were ended as well."""
        over = {TrialState.COMPLETE} | (set() if pruned else {TrialState.PRUNED})
        return sorted(n for n, trial in self._newest().items() if trial.state not in over)

    def ask(self, number: int) -> Chosen:
        """Choose the next trial, and give it a number."""
        # Else what is left out would be drawn again and again.
        left_out = sum(
            trial.user_attrs.get(_NUMBER) == _LEFT_OUT
            for trial in self._study.get_trials(deepcopy=False)
        )
        seed = _seed_of(self._settings.seed, number + left_out)
        self._study.sampler = _sampler(self._settings, seed)
        return self._begin(number)

    def ask_again(self, number: int) -> Chosen:
        """The same trial once more: what was told of its attempt before is no result."""
        before = self._newest()[number]
        if not before.state.is_finished():
            self._study.tell(before.number, state=TrialState.FAIL)
        self._study.enqueue_trial(before.params)
        return self._begin(number)

    def _begin(self, number: int) -> Chosen:
        trial = self._study.ask(self._distributions)
        trial.set_user_attr(_NUMBER, number)
        self._running[number] = trial
        return Chosen(number, write_overrides(self._space, trial.params))

    def leave_out(self, number: int) -> None:
        """Tell the study that what it has chosen cannot be run."""
        trial = self._running.pop(number)
        trial.set_user_attr(_NUMBER, _LEFT_OUT)
        self._study.tell(trial, state=TrialState.FAIL)

    def judge(self, number: int, evaluations: Sequence[Mapping[str, float]]) -> Pruned | None:
        """Report new evaluations of a trial; why it is hopeless, or None where it is not."""
        trial = self._running.get(number)
        if trial is None or not self._report(number, trial, evaluations) or not self._may_prune:
            return None
        if not trial.should_prune():
            return None
        last = evaluations[-1]
        step, value = int(last["step"]), float(last[self._metric])
        why = f"{self._metric} {value:.4f} at step {step} is behind other trials"
        return Pruned(step, value, f"{why} (hydra.sweeper.pruner={self._settings.pruner})")

    def _report(
        self, number: int, trial: Trial, evaluations: Sequence[Mapping[str, float]]
    ) -> bool:
        """Whether there was anything new."""
        before = self._reported.get(number, 0)
        for row in evaluations:
            value = row.get(self._metric)
            if row["step"] > self._reported.get(number, 0) and value is not None:
                trial.report(float(value), int(row["step"]))
                self._reported[number] = int(row["step"])
        return self._reported.get(number, 0) > before

    def tell(self, standing: Standing, evaluations: Sequence[Mapping[str, float]]) -> None:
        """Tell the study how a trial has come out; nothing of one that is to be gone on with."""
        trial = self._running.get(standing.number)
        if trial is None or not standing.is_over or standing.state in STOPPED:
            return
        self._report(standing.number, trial, evaluations)
        value = standing.value
        if standing.state == DONE and value is not None and math.isfinite(value):
            self._study.tell(trial, value)
        elif standing.state == PRUNED:
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, state=TrialState.FAIL)
        del self._running[standing.number]

    def _newest(self) -> dict[int, FrozenTrial]:
        """The newest attempt at each trial; one that was never numbered never began."""
        trials = self._study.get_trials(deepcopy=False)
        numbered = {int(one.user_attrs.get(_NUMBER, _LEFT_OUT)): one for one in trials}
        return {number: trial for number, trial in numbered.items() if number >= 0}


def distribution_of(axis: Axis) -> BaseDistribution:
    """An axis as Optuna has it."""
    if isinstance(axis, Words):
        return CategoricalDistribution(axis.choices)
    if axis.is_int:
        step = int(axis.step) or 1
        return IntDistribution(int(axis.low), int(axis.high), log=axis.is_log, step=step)
    return FloatDistribution(axis.low, axis.high, log=axis.is_log, step=axis.step or None)


def _storage(file: Path) -> optuna.storages.JournalStorage:
    if file.is_file():
        # What a killed process has left of a line; a line after it would make the file unreadable.
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    file.parent.mkdir(parents=True, exist_ok=True)
    return optuna.storages.JournalStorage(JournalFileBackend(str(file)))


def _seed_of(seed: int, number: int) -> int:
    """Of a trial's own draws; those of neighbours have nothing in common."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big")


def _sampler(settings: SearchSettings, seed: int) -> optuna.samplers.BaseSampler:
    if settings.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=settings.startup_trials)


def _pruner(settings: SearchSettings) -> optuna.pruners.BasePruner:
    if settings.pruner == "median":
        return optuna.pruners.MedianPruner(
            n_startup_trials=settings.prune_after_trials, n_warmup_steps=settings.prune_after_step
        )
    if settings.pruner == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=max(1, settings.prune_after_step)
        )
    return optuna.pruners.NopPruner()
