"""NaN, infinity and spikes: reported with the batch that caused them, and acted on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dtune.errors import DivergedError
from dtune.runtime.logs import log
from dtune.train.guard import CAUSES, NONFINITE
from dtune.train.step import StepStats
from dtune.types import IGNORE_INDEX, Batch

if TYPE_CHECKING:
    from dtune.train.trainer import Trainer

MAX_TEXT = 4000
"""Characters of a sequence that the report shows."""

MAX_SKIPPED_IN_A_ROW = 16
"""After so many overflows a loss scale of 2**16, where it starts, is 1."""


@dataclass
class Overflows:
    """Tells overflows of fp16, which the engine has skipped, from divergence."""

    in_a_row: int = 0

    def allow(self, norm: float, skipped: int) -> bool:
        """Whether a step of this norm may be, with so many of the flush skipped and not yet told.

        Not more in a row than it takes to lower the loss scale to nothing.
        """
        if math.isfinite(norm):
            self.in_a_row = 0
            return True
        if skipped == 0 or self.in_a_row == MAX_SKIPPED_IN_A_ROW:
            return False
        self.in_a_row += 1
        return True


class GoBack(Exception):
    """The run is to go on from its last checkpoint without a step; raised on all ranks."""

    def __init__(self, bad: BadStep) -> None:
        super().__init__(bad.what)
        self.bad = bad


@dataclass(frozen=True)
class BadStep:
    """A step that the optimizer has not taken."""

    stats: StepStats
    loss: float
    norm: float
    cause: int
    """NONFINITE or SPIKE."""

    @property
    def what(self) -> str:
        """Which number is bad, at which step."""
        spiked = f"a spike to loss {self.loss:.4g}, gradient norm {self.norm:.4g}"
        if self.cause == NONFINITE:
            bad_loss = not math.isfinite(self.loss)
            spiked = f"loss {self.loss}" if bad_loss else f"gradient norm {self.norm}"
        return f"{spiked} at step {self.stats.step}"

    def row(self, action: str, step: int) -> dict[str, str | int | float]:
        """The row of metrics that tells of it."""
        return {
            "kind": "guard",
            "step": step,
            "bad_step": self.stats.step,
            "cause": CAUSES[self.cause],
            "action": action,
            "loss": self.loss,
            "grad_norm": self.norm,
        }


def act_on(bad: BadStep, trainer: Trainer) -> None:
    """Do with a bad step as the config says; collective.

    A skipped step is written down and counted. Raises GoBack for a rollback, DivergedError where
    the run is to stop: at once, or because there have been as many as the config allows.
    """
    config, state = trainer.guard_config, trainer.progress.guard
    policy = (config.nonfinite if bad.cause == NONFINITE else config.spike).value
    if policy == "stop":
        raise_diverged(bad, trainer=trainer)
    if policy == "skip":
        if state.skips_in_a_row == config.max_skips_in_a_row or state.skips == config.max_skips:
            many = f"{state.skips_in_a_row} steps in a row and {state.skips} in all were skipped"
            raise_diverged(bad, trainer=trainer, after=f" after {many}")
        state.skips += 1
        state.skips_in_a_row += 1
        path = write_report(bad, trainer, name="guard")
        log.warning("%s: its optimizer step is skipped; see the batch in %s", bad.what, path)
        trainer.write(bad.row("skip", bad.stats.step))
        return
    if state.rollbacks == config.max_rollbacks:
        raise_diverged(bad, trainer=trainer, after=f" after {state.rollbacks} rollbacks")
    write_report(bad, trainer, name="guard")
    raise GoBack(bad)


def raise_diverged(bad: BadStep, *, trainer: Trainer, after: str = "") -> NoReturn:
    """Raise DivergedError for a step; collective.

    The batches of that step are made again (they are a function of the step) and written to
    ``RUN/diverged-step-<n>.json``: rows, text, share of trained tokens, this loss on each rank.
    """
    path = write_report(bad, trainer, name="diverged")
    trainer.write(bad.row("stop", bad.stats.step))
    raise DivergedError(
        f"{bad.what}{after}: the run is stopped, the last checkpoint is good; see the batch in "
        f"{path}, lower optim.lr or train.max_norm, use precision=bf16, or set guard=skip or "
        "guard=rollback"
    )


def check_metrics(metrics: Mapping[str, float], step: int) -> None:
    """Raise DivergedError where the held-out rows give what is no number."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise DivergedError(
                f"held-out {name} {value} after step {step}: the run is stopped, the last "
                "checkpoint is good; lower optim.lr or train.max_norm, or use precision=bf16"
            )


def write_report(bad: BadStep, trainer: Trainer, *, name: str) -> Path:
    """Write down the batches of a bad step on all ranks; the file. Collective."""
    stats = bad.stats
    batches = trainer.loader.batches(stats.step - 1)
    mine = {
        "rank": trainer.world.rank,
        "loss_share": repr(float(stats.loss_share)),
        "trained_share": sum(b.num_targets for b in batches)
        / max(1, sum(b.num_tokens for b in batches)),
        "rows": [record for batch in batches for record in _describe(batch, trainer)],
    }
    report = {
        "step": stats.step,
        "cause": CAUSES[bad.cause],
        "loss": repr(bad.loss),
        "grad_norm": repr(bad.norm),
        "learning_rate": stats.learning_rate,
        "ranks": trainer.world.gather(mine),
    }
    path = trainer.run_dir / f"{name}-step-{stats.step}.json"
    if trainer.world.is_first:
        path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _describe(batch: Batch, trainer: Trainer) -> list[dict[str, object]]:
    """A record for each sequence of a batch: its data rows and its text."""
    records: list[dict[str, object]] = []
    for number, rows in enumerate(batch.rows):
        if not rows:
            continue
        kept = batch.document_ids[number] >= 0
        text = str(trainer.tokenizer.decode(batch.input_ids[number][kept].tolist()))
        records.append(
            {
                "rows": [trainer.loader.dataset.origin(row) for row in rows],
                "tokens": int(kept.sum()),
                "trained": int((batch.labels[number] != IGNORE_INDEX).sum()),
                "text": text[:MAX_TEXT],
            }
        )
    return records
