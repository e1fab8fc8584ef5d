"""Makes training slow where a test wants it. Python runs this file at its start where PYTHONPATH
names its folder, so the whole command is the real one and no code of dtune knows of it.

``DTUNE_TEST_HOLD_AT``: in a job's first attempt, before that step, the first rank waits until it is
asked to stop. ``DTUNE_TEST_SLOW_SAVE``: seconds that the save takes longer which follows.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TRAINER = "dtune.train.trainer"
HOLD_AT = int(os.environ.get("DTUNE_TEST_HOLD_AT", "0"))
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


class Finder(importlib.abc.MetaPathFinder):
    """Finds the trainer as others do, and patches it once it has been loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TRAINER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_patch(module: ModuleType) -> None:
            load(module)
            patch(module)

        spec.loader.exec_module = load_and_patch  # type: ignore[method-assign]
        return spec


if HOLD_AT:
    sys.meta_path.insert(0, Finder())
