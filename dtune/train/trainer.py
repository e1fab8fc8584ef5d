"""The training loop: steps, and between them evaluation, saving and stopping."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from dtune.checkpoint.manifest import Identity
from dtune.checkpoint.schema import Best
from dtune.checkpoint.writer import Checkpointer, SaveFailure
from dtune.data.loader import Loader, prefetch
from dtune.errors import CheckpointError, DivergedError
from dtune.evaluate.mode import AsksToStop, EvaluationStopped
from dtune.measure.memory import peak_memory_gib
from dtune.measure.throughput import Meter
from dtune.runtime.logs import log
from dtune.runtime.schema import Precision
from dtune.runtime.signals import StopRequest
from dtune.runtime.status import State
from dtune.runtime.watch.heartbeat import Place, Section, at, begin_step, end_step, enter, section
from dtune.runtime.watch.join import meet_ranks
from dtune.runtime.watch.schema import WatchConfig
from dtune.runtime.world import World
from dtune.train.divergence import (
    BadStep,
    GoBack,
    Overflows,
    act_on,
    check_metrics,
    raise_diverged,
)
from dtune.train.guard import GOOD, NONFINITE, Guard
from dtune.train.guard_schema import GuardConfig
from dtune.train.own_time import OwnTime
from dtune.train.participant import WithMethod
from dtune.train.progress import RunProgress
from dtune.train.rollback import roll_back
from dtune.train.saving import settle_save
from dtune.train.schema import TrainConfig
from dtune.train.sinks.background import CLOSE_SECONDS, FAILED_SECONDS, HURRY_SECONDS
from dtune.train.sinks.base import Row, Sink
from dtune.train.sinks.build import close_sinks
from dtune.train.speed import Speed
from dtune.train.step import StepStats, train_step
from dtune.types import Batch, Engine, Objective, TakesPartInSteps


class Evaluator(Protocol):
    """Metrics of the engine's model as it is; collective."""

    def __call__(self, engine: Engine, asks_to_stop: AsksToStop) -> dict[str, float]:
        """Values by name of the metric; EvaluationStopped, on all ranks, where asked to stop."""
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
    guard_config: GuardConfig
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
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        self.meter = Meter(untimed_steps=self.config.warmup_steps_untimed)
        self._pending: list[StepStats] = []
        self.batches: Sequence[Batch] = ()
        """Micro batches of the step that is being done."""
        self._own_time = OwnTime(self.world.device)
        self._step_ended = self._waiting_since = time.perf_counter()
        self._skipped_before = self.engine.skipped_steps
        self._overflows = Overflows()
        self.failed_save: SaveFailure | None = None
        """What status.json tells of."""
        self.guard = Guard(
            self.guard_config,
            self.world,
            scales_loss=self.engine.precision is Precision.fp16,
            state=self.progress.guard,
        )

    def fit(self, *, evaluate_before: bool) -> State:
        """Train to the last step, early stopping or a stop request; everything is saved then.

        Returns State.done or State.preempted. Raises DivergedError for a loss or gradient that is
        not finite, CheckpointError where a checkpoint cannot be written.
        """
        self.stop.install()
        state: State | None = None
        try:
            state = self._fit(evaluate_before=evaluate_before)
        except DivergedError:
            # Every rank raises it. What is being written was taken before, and is to be whole.
            self.checkpointer.wait()
            raise
        finally:
            self._close_sinks(failed=state is None)
        return state

    def _close_sinks(self, *, failed: bool) -> None:
        if not failed:
            close_sinks(self.sinks, seconds=HURRY_SECONDS if self.stop.is_set else CLOSE_SECONDS)
            return
        # The other ranks are told of the failure only then.
        seconds = FAILED_SECONDS if self.world.size > 1 else HURRY_SECONDS
        try:
            close_sinks(self.sinks, seconds=seconds)
        except CheckpointError as error:
            # What is raised already is why the run ends.
            log.error("%s", error)

    def _fit(self, *, evaluate_before: bool) -> State:
        if self.progress.step or self.saved_step == 0:
            self.write({"kind": "resume", "step": self.progress.step})
            # From another folder: from now on this one has what it takes to go on.
            self.save()
        # A signal that came while the run was assembled: there is nothing to save yet.
        if self._is_asked_to_stop():
            self.checkpointer.close()
            return State.preempted
        if evaluate_before and not self.progress.step and not self.evaluate():
            self.checkpointer.close()
            return State.preempted
        if not self._evaluate_again():
            self.checkpointer.close()
            return State.preempted
        if self.guard_config.rolls_back and self.saved_step < 0:
            self.save()
        # A run that had stopped early, resumed: it goes on only if it may wait for longer.
        state = State.done if self._has_stalled() else self._loop()
        enter(Section.save)
        if state is State.done and not self.evaluate():
            state = State.preempted
        if state is State.done or self._urgency() < 2:
            self.save()
        with self.meter.apart("save"):
            self.checkpointer.close()
        return state

    def _evaluate_again(self) -> bool:
        """Do the evaluation that a signal broke off when the run was stopped; False if one does."""
        if self._is_due(self.progress.step, self.cadence.evaluate) and self.progress.step:
            return self.evaluate()
        return True

    def _loop(self) -> State:
        while True:
            try:
                return self._steps()
            except GoBack as back:
                bad = back.bad
            self._pending = []
            with self.meter.apart("rollback"), section(Section.start):
                roll_back(bad, self)
            self._skipped_before = self.engine.skipped_steps

    def _steps(self) -> State:
        self.engine.model.train()
        start = self.progress.step
        self.meter.start()
        self._wait_for_batches(first=True)
        for step, batches in enumerate(prefetch(self.loader, start, self.total_steps), start + 1):
            self.advance(step, batches)
            if self._is_due(step, self.cadence.evaluate):
                self.evaluate()
            if self._is_due(step, self.cadence.save):
                self.save()
            settle_save(self)
            if self._is_asked_to_stop():
                self._flush()
                return State.preempted
            if self._has_stalled():
                break
            if self._is_due(step, self.watch.check_every):
                meet_ranks(self.world, self.watch)
            self._wait_for_batches()
        self._flush()
        return State.done

    def _is_asked_to_stop(self) -> bool:
        """Whether a signal came to any rank; collective."""
        if not self._urgency():
            return False
        by = self.stop.signal_name or "a signal to another rank"
        log.info("stopping at step %d as asked by %s", self.progress.step, by)
        return True

    def _urgency(self) -> int:
        """How urgently any rank is asked to stop; collective."""
        return self.world.largest(self.stop.urgency)

    def advance(self, step: int, batches: Sequence[Batch]) -> None:
        """Do one optimizer step, and log it where one is due."""
        self._own_time.add(time.perf_counter() - self._waiting_since)
        begin_step(step)
        self.batches = batches
        stats = train_step(
            step,
            batches,
            engine=self.engine,
            objective=self.objective,
            world=self.world,
            max_norm=self.config.max_norm,
            guard=self.guard,
            left_out=step in self.progress.guard.left_out,
            own_time=self._own_time,
            participant=self.participant,
            total_steps=self.total_steps,
        )
        self._pending.append(stats)
        self.progress.step = step
        done_warming = self.meter.steps + len(self._pending) == self.config.warmup_steps_untimed
        if step % self.cadence.log == 0 or step == self.total_steps or done_warming:
            self._flush()

    def _wait_for_batches(self, *, first: bool = False) -> None:
        """Tell the watchdog that a step is over, and that the batches of the next one are due."""
        now = time.perf_counter()
        if first:
            enter(Section.first_step)
            self._own_time.take()
        else:
            end_step(self._own_time.take(), now - self._step_ended)
        self._step_ended = self._waiting_since = now
        at(Place.batch)

    def _is_due(self, step: int, every: int) -> bool:
        return every > 0 and step % every == 0 and step != self.total_steps

    def _flush(self) -> None:
        """Bring the pending steps to the host: check, count and write them."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        losses = torch.stack([stats.verdict.loss for stats in pending]).tolist()
        causes = torch.stack([stats.verdict.cause for stats in pending]).tolist()
        norms = torch.stack([stats.grad_norm for stats in pending]).tolist()
        counts = torch.stack([stats.counts for stats in pending]).tolist()
        skipped = self.engine.skipped_steps - self._skipped_before
        self._skipped_before = self.engine.skipped_steps
        tokens, targets = sum(count[1] for count in counts), sum(count[0] for count in counts)
        seconds = self.meter.lap(steps=len(pending), tokens=tokens, targets=targets)
        shared = self._shared_numbers(tokens / seconds, targets / seconds)
        untold = skipped
        for stats, loss, norm, cause, count in zip(
            pending, losses, norms, causes, counts, strict=True
        ):
            if cause != GOOD:
                act_on(BadStep(stats, loss, norm, cause), self)
                continue
            if stats.step in self.progress.guard.left_out:
                self.write({"kind": "guard", "step": stats.step, "action": "left out"})
                continue
            if not self._overflows.allow(norm, untold):
                raise_diverged(BadStep(stats, loss, norm, NONFINITE), trainer=self)
            untold -= not math.isfinite(norm)
            self.progress.guard.skips_in_a_row = 0
            self.progress.tokens += count[1]
            self.progress.targets += count[0]
            self.write(
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

    def _shared_numbers(self, tokens_per_second: float, targets_per_second: float) -> Row:
        row: Row = {
            "tokens_per_second": tokens_per_second,
            "targets_per_second": targets_per_second,
            "peak_memory_gib": peak_memory_gib(self.world.device),
        }
        if (mfu := self.speed.mfu(tokens_per_second, targets_per_second)) is not None:
            row["mfu"] = mfu
        return row

    def evaluate(self) -> bool:
        """Measure on the held-out rows, unless this step has been; keep the best checkpoint.

        False where a signal has broken it off: then nothing is known of this step.
        """
        if self.evaluator is None or self.progress.last_evaluated_step == self.progress.step:
            return True
        self._flush()
        try:
            with self.meter.apart("evaluate"), section(Section.evaluation):
                metrics = self.evaluator(self.engine, lambda: self._urgency() > 0)
        except EvaluationStopped:
            return False
        check_metrics(metrics, self.progress.step)
        progress = self.progress
        progress.last_evaluated_step = progress.step
        progress.last_evaluation = metrics
        if progress.step == 0:
            progress.first_evaluation = metrics
        self.write({"kind": "eval", "step": progress.step, **metrics})
        if progress.step == 0:
            return True
        value = metrics[self.best.value]
        if progress.best_step < 0 or is_gain(self.best, value, progress.best_value):
            progress.best_step, progress.best_value = progress.step, value
            progress.evaluations_without_gain = 0
            if self.saved_step == progress.step:
                self.checkpointer.mark_best(progress.step)
            self.save()
        else:
            progress.evaluations_without_gain += 1
        return True

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
        guard = self.progress.guard
        guard.losses, guard.norms = self.guard.window()
        with self.meter.apart("save"), section(Section.save):
            self.checkpointer.save(
                step,
                WithMethod(self.engine, self.participant, self.world).state(),
                asdict(self.progress),
                is_best=self.progress.best_step == step,
                identity=self.identity,
            )
        self.saved_step = step

    def write(self, row: Row) -> None:
        """Give a row to every sink."""
        for sink in self.sinks:
            sink.write(row)


def is_gain(best: Best, value: float, so_far: float) -> bool:
    """Whether a value of the metric is better than the best so far."""
    return value > so_far if best is Best.exact_match else value < so_far
