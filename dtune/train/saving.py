"""What becomes of a save, as the loop and those outside get to know it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtune.runtime.logs import log
from dtune.runtime.status import State, Status, status_of, write_status

if TYPE_CHECKING:
    from dtune.train.trainer import Trainer


def settle_save(trainer: Trainer) -> None:
    """Ask once a step what became of the save that is being written; collective.

    Raises CheckpointError on every rank where it has failed and the run is to stop. Where it is
    to go on, ``status.json`` and a row of the metrics say what failed, until a save succeeds.
    """
    saver = trainer.checkpointer
    if not saver.is_settled():
        return
    failure, told = saver.failure, trainer.failed_save
    if failure == told:
        return
    trainer.failed_save = failure
    if failure is not None:
        trainer.write({"kind": "save_failed", "step": failure.step, "message": failure.message})
        # There is no checkpoint of it: it is saved when it is asked for again.
        trainer.saved_step = -1 if trainer.saved_step == failure.step else trainer.saved_step
    if trainer.world.is_first:
        _tell(trainer, "" if failure is None else failure.message)


def _tell(trainer: Trainer, message: str) -> None:
    try:
        # Not over what a watchdog may have to say by now.
        if status_of(trainer.run_dir)[0].state is State.running:
            step = trainer.progress.step
            write_status(trainer.run_dir, Status(State.running, step, message=message))
    except OSError as error:
        log.warning("status.json cannot be written: %s", error)
