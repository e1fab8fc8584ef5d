"""Makes training slow where a test wants it.

``DTUNE_TEST_HOLD_AT``: in a job's first attempt, before that step, the first rank waits until it is
asked to stop. ``DTUNE_TEST_SLOW_SAVE``: seconds that the save takes longer which follows.
"""

from __future__ import annotations

import os
import time
from types import ModuleType
from typing import Any

HOLD_AT = int(os.environ["DTUNE_TEST_HOLD_AT"])
SLOW_SAVE = float(os.environ.get("DTUNE_TEST_SLOW_SAVE", "0"))


def patch(module: ModuleType) -> None:
    """Hold the trainer before a step, and slow what it saves once it was asked to stop."""
    trainer: Any = module.Trainer
    advance, save, fsync = trainer.advance, trainer.save, os.fsync
    seconds = [0.0]

    def held(self: Any, step: int, *args: Any, **kwargs: Any) -> Any:
        while step == HOLD_AT and os.environ["RANK"] == "0" and not self.stop.is_set:
            time.sleep(0.01)
        return advance(self, step, *args, **kwargs)

    def slowed(self: Any) -> None:
        if self.stop.is_set:
            seconds[0] = SLOW_SAVE
        save(self)

    def slow_fsync(descriptor: int) -> None:
        wait, seconds[0] = seconds[0], 0.0
        time.sleep(wait)
        fsync(descriptor)

    if "SLURM_RESTART_COUNT" not in os.environ:
        trainer.advance, trainer.save, os.fsync = held, slowed, slow_fsync
