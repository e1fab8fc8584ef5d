"""The training loop: steps, and between them evaluation, saving and stopping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from dtune.checkpoint.manifest import Identity
from dtune.checkpoint.schema import Best
from dtune.checkpoint.writer import Checkpointer
from dtune.data.loader import Loader, prefetch
from dtune.errors import DivergedError
from dtune.measure.memory import peak_memory_gib
from dtune.measure.throughput import Meter
from dtune.runtime.logs import log
from dtune.runtime.signals import StopRequest
from dtune.runtime.status import State
from dtune.runtime.world import World
from dtune.train.divergence import check_metrics, count_good, raise_diverged
from dtune.train.participant import WithMethod
from dtune.train.schema import TrainConfig
from dtune.train.sinks.base import Row, Sink
from dtune.train.speed import Speed
from dtune.train.step import StepStats, train_step
from dtune.types import Batch, Engine, Objective, TakesPartInSteps


@dataclass
class RunProgress:
    """What the loop itself must have back to go on."""

    step: int = 0
    tokens: int = 0
    targets: int = 0
    best_step: int = -1
    best_value: float = 0.0
    evaluations_without_gain: int = 0
    first_evaluation: dict[str, float] = field(default_factory=dict)
    last_evaluation: dict[str, float] = field(default_factory=dict)
    last_evaluated_step: int = -1


class Evaluator(Protocol):
    """Metrics of the engine's model as it is; collective."""

    def __call__(self, engine: Engine) -> dict[str, float]:
        """Values by name of the metric."""
        ...


@dataclass(frozen=True)
class Cadence:
    """Optimizer steps between things that happen in the loop; 0: never."""

    log: int
    evaluate: int
    save: int


@dataclass
class Trainer:
    """Runs a prepared engine over its data."""

    engine: Engine
    objective: Objective
    loader: Loader
    evaluator: Evaluator | None
    checkpointer: Checkpointer
    identity: Identity
    sinks: Sequence[Sink]
    world: World
    config: TrainConfig
    cadence: Cadence
    best: Best
    speed: Speed
    total_steps: int
    tokenizer: PreTrainedTokenizerBase
    run_dir: Path
    progress: RunProgress = field(default_factory=RunProgress)
    participant: TakesPartInSteps | None = None
    """The method, where it takes part in steps."""
    saved_step: int = -1
    """Newest step that run_dir holds a checkpoint of; -1: none."""
    stop: StopRequest = field(default_factory=StopRequest)

    def __post_init__(self) -> None:
        self.meter = Meter(untimed_steps=self.config.warmup_steps_untimed)
        self._pending: list[StepStats] = []
        self._skipped_before = self.engine.skipped_steps
        self._skipped_in_a_row = 0

    def fit(self, *, evaluate_before: bool) -> State:
        """Train to the last step, early stopping or a stop request; everything is saved then.

        Returns State.done or State.preempted. Raises DivergedError for a loss or gradient that is
        not finite, CheckpointError where a checkpoint cannot be written.
        """
        self.stop.install()
        try:
            return self._fit(evaluate_before=evaluate_before)
        except DivergedError:
            # Every rank raises it. What is being written was taken before, and is to be whole.
            self.checkpointer.wait()
            raise
        finally:
            for sink in self.sinks:
                sink.close()

    def _fit(self, *, evaluate_before: bool) -> State:
        if self.progress.step:
            self._write({"kind": "resume", "step": self.progress.step})
            # From another folder: from now on this one has what it takes to go on.
            self.save()
        # A signal that came while the run was assembled: there is nothing to save yet.
        if self._is_asked_to_stop():
            self.checkpointer.close()
            return State.preempted
        if evaluate_before and not self.progress.step:
            self.evaluate()
        # A run that had stopped early, resumed: it goes on only if it may wait for longer.
        state = State.done if self._has_stalled() else self._loop()
        if state is State.done:
            self.evaluate()
        self.save()
        with self.meter.apart("save"):
            self.checkpointer.close()
        return state

    def _loop(self) -> State:
        self.engine.model.train()
        start = self.progress.step
        self.meter.start()
        for step, batches in enumerate(prefetch(self.loader, start, self.total_steps), start + 1):
            self.advance(step, batches)
            if self._is_due(step, self.cadence.evaluate):
                self.evaluate()
            if self._is_due(step, self.cadence.save):
                self.save()
            if self._is_asked_to_stop():
                self._flush()
                return State.preempted
            if self._has_stalled():
                break
        self._flush()
        return State.done

    def _is_asked_to_stop(self) -> bool:
        """Whether a signal came to any rank; collective."""
        if not self.world.any_says(self.stop.is_set):
            return False
        by = self.stop.signal_name or "a signal to another rank"
        log.info("stopping at step %d as asked by %s", self.progress.step, by)
        return True

    def advance(self, step: int, batches: Sequence[Batch]) -> None:
        """Do one optimizer step, and log it where one is due."""
        stats = train_step(
            step,
            batches,
            engine=self.engine,
            objective=self.objective,
            world=self.world,
            max_norm=self.config.max_norm,
            participant=self.participant,
            total_steps=self.total_steps,
        )
        self._pending.append(stats)
        self.progress.step = step
        done_warming = self.meter.steps + len(self._pending) == self.config.warmup_steps_untimed
        if step % self.cadence.log == 0 or step == self.total_steps or done_warming:
            self._flush()

    def _is_due(self, step: int, every: int) -> bool:
        return every > 0 and step % every == 0 and step != self.total_steps

    def _flush(self) -> None:
        """Bring the pending steps to the host: check, count and write them."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        losses = self.world.sum(torch.stack([stats.loss for stats in pending])).tolist()
        norms = torch.stack([stats.grad_norm for stats in pending]).tolist()
        counts = torch.stack([stats.counts for stats in pending]).tolist()
        skipped = self.engine.skipped_steps - self._skipped_before
        self._skipped_before = self.engine.skipped_steps
        good, self._skipped_in_a_row = count_good(
            losses, norms, skipped, in_a_row=self._skipped_in_a_row
        )
        tokens, targets = sum(count[1] for count in counts), sum(count[0] for count in counts)
        self.progress.tokens += tokens
        self.progress.targets += targets
        seconds = self.meter.lap(steps=len(pending), tokens=tokens, targets=targets)
        shared = self._shared_numbers(tokens / seconds, targets / seconds)
        rows = zip(pending, losses, norms, counts, strict=True)
        for stats, loss, norm, count in islice(rows, good):
            self._write(
                {
                    "kind": "train",
                    "step": stats.step,
                    "loss": loss,
                    "lr": stats.learning_rate,
                    "grad_norm": norm,
                    "tokens": count[1],
                    "targets": count[0],
                    "slots": count[2],
                    **shared,
                    **({"skipped_steps": skipped} if skipped and stats is pending[-1] else {}),
                }
            )
        if good < len(pending):
            raise_diverged(pending[good], losses[good], norms[good], trainer=self)

    def _shared_numbers(self, tokens_per_second: float, targets_per_second: float) -> Row:
        row: Row = {
            "tokens_per_second": tokens_per_second,
            "targets_per_second": targets_per_second,
            "peak_memory_gib": peak_memory_gib(self.world.device),
        }
        if (mfu := self.speed.mfu(tokens_per_second)) is not None:
            row["mfu"] = mfu
        return row

    def evaluate(self) -> None:
        """Measure on the held-out rows, unless this step has been; keep the best checkpoint."""
        if self.evaluator is None or self.progress.last_evaluated_step == self.progress.step:
            return
        self._flush()
        with self.meter.apart("evaluate"):
            metrics = self.evaluator(self.engine)
        check_metrics(metrics, self.progress.step)
        progress = self.progress
        progress.last_evaluated_step = progress.step
        progress.last_evaluation = metrics
        if progress.step == 0:
            progress.first_evaluation = metrics
        self._write({"kind": "eval", "step": progress.step, **metrics})
        if progress.step == 0:
            return
        value = metrics[self.best.value]
        if progress.best_step < 0 or is_gain(self.best, value, progress.best_value):
            progress.best_step, progress.best_value = progress.step, value
            progress.evaluations_without_gain = 0
            self.save()
        else:
            progress.evaluations_without_gain += 1

    def _has_stalled(self) -> bool:
        patience, seen = self.config.early_stopping, self.progress.evaluations_without_gain
        if patience and seen >= patience:
            log.info(
                "stopping early: %d evaluations without a better %s than %.4f of step %d",
                seen,
                self.best.value,
                self.progress.best_value,
                self.progress.best_step,
            )
            return True
        return False

    def save(self) -> None:
        """Write a checkpoint of this step, unless there is one."""
        step = self.progress.step
        if self.saved_step == step:
            return
        self._flush()
        with self.meter.apart("save"):
            self.checkpointer.save(
                step,
                WithMethod(self.engine, self.participant, self.world).state(),
                asdict(self.progress),
                is_best=self.progress.best_step == step,
                identity=self.identity,
            )
        self.saved_step = step

    def _write(self, row: Row) -> None:
        for sink in self.sinks:
            sink.write(row)


def is_gain(best: Best, value: float, so_far: float) -> bool:
    """Whether a value of the metric is better than the best so far."""
    return value > so_far if best is Best.exact_match else value < so_far
