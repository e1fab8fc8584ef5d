"""Going back to the last checkpoint after a bad step, and on without it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtune.checkpoint.adopt import adopt_checkpoint
from dtune.checkpoint.reader import CHECKPOINTS, find_checkpoint, load_checkpoint
from dtune.runtime.logs import log
from dtune.train.divergence import BadStep
from dtune.train.participant import WithMethod
from dtune.train.progress import RunProgress

if TYPE_CHECKING:
    from dtune.train.trainer import Trainer


def roll_back(bad: BadStep, trainer: Trainer) -> None:
    """Put the trainer where its newest whole checkpoint was; collective.

    The bad step, and as many before it as the config says, are left out from then on. Raises
    CheckpointError where no checkpoint is whole.
    """
    trainer.checkpointer.wait()
    world, step = trainer.world, bad.stats.step
    found = find_checkpoint(trainer.run_dir, "auto", world)
    assert found is not None, "a run that may roll back saves before its first step"
    whole = WithMethod(trainer.engine, trainer.participant, world)
    load_checkpoint(found, engine=whole, identity=trainer.identity, world=world)
    before, progress = trainer.progress.guard, RunProgress.parse(found.extra)
    held = adopt_checkpoint(
        found, trainer.run_dir / CHECKPOINTS, best_step=progress.best_step, world=world
    )
    first = max(found.step, step - trainer.guard_config.leave_out) + 1
    progress.guard.rollbacks = before.rollbacks + 1
    progress.guard.left_out = sorted({*before.left_out, *range(first, step + 1)})
    trainer.progress, trainer.saved_step = progress, held.saved_step
    trainer.guard.restore(progress.guard)
    log.warning(
        "%s: back to step %d, and on without steps %d to %d", bad.what, found.step, first, step
    )
    # Readers drop what stands before this row and is later than its step.
    trainer.write({"kind": "resume", "step": found.step})
    trainer.write(bad.row("rollback", found.step))
