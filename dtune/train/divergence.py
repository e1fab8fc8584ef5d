"""NaN and infinity: found, reported with the batch that caused them, and the run stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dtune.errors import DivergedError
from dtune.train.step import StepStats
from dtune.types import IGNORE_INDEX, Batch

if TYPE_CHECKING:
    from dtune.train.trainer import Trainer

MAX_TEXT = 4000
"""Characters of a sequence that the report shows."""

MAX_SKIPPED_IN_A_ROW = 16
"""After so many overflows a loss scale of 2**16, where it starts, is 1."""


def count_good(
    losses: Sequence[float], norms: Sequence[float], skipped: int, *, in_a_row: int
) -> tuple[int, int]:
    """How many steps come before the first that diverged, and how many of the last were skipped.

    A step diverged if its loss or gradient norm is not finite. ``skipped`` steps of fp16 loss
    scaling may have an infinite norm, as they did not update; but not more in a row than it takes
    to lower the scale to nothing, counted on from ``in_a_row``.
    """
    for number, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        if math.isfinite(loss) and math.isfinite(norm):
            in_a_row = 0
            continue
        if not math.isfinite(loss) or skipped == 0 or in_a_row == MAX_SKIPPED_IN_A_ROW:
            return number, in_a_row
        skipped -= 1
        in_a_row += 1
    return len(losses), in_a_row


def raise_diverged(stats: StepStats, loss: float, norm: float, *, trainer: Trainer) -> NoReturn:
    """Raise DivergedError for a step; collective.

    The batches of that step are made again (they are a function of the step) and written to
    ``RUN/diverged-step-<n>.json``: rows, text, share of trained tokens, this loss on each rank.
    """
    path = _write_report(stats, loss, norm, trainer)
    what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm}"
    raise DivergedError(
        f"{what} at step {stats.step}: the run is stopped, the last checkpoint is good; "
        f"see the batch in {path}, lower optim.lr or train.max_norm, or use precision=bf16"
    )


def check_metrics(metrics: Mapping[str, float], step: int) -> None:
    """Raise DivergedError where the held-out rows give what is no number."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise DivergedError(
                f"held-out {name} {value} after step {step}: the run is stopped, the last "
                "checkpoint is good; lower optim.lr or train.max_norm, or use precision=bf16"
            )


def _write_report(stats: StepStats, loss: float, norm: float, trainer: Trainer) -> Path:
    batches = trainer.loader.batches(stats.step - 1)
    mine = {
        "rank": trainer.world.rank,
        "loss_share": repr(float(stats.loss)),
        "trained_share": sum(b.num_targets for b in batches)
        / max(1, sum(b.num_tokens for b in batches)),
        "rows": [record for batch in batches for record in _describe(batch, trainer)],
    }
    report = {
        "step": stats.step,
        "loss": repr(loss),
        "grad_norm": repr(norm),
        "learning_rate": stats.learning_rate,
        "ranks": trainer.world.gather(mine),
    }
    path = trainer.run_dir / f"diverged-step-{stats.step}.json"
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
