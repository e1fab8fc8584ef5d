"""Makes a worker fail on purpose.

``DTUNE_TEST_FAULTS`` names a folder with ``plan.json``, a list of faults (tests/faults/injection.py
writes it). They happen one after another, one in each attempt; ``fired-<n>.json`` tells of each.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def _kill(trainer: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise(trainer: Any) -> None:
    raise RuntimeError("a fault injected by a test")


def _exit(trainer: Any) -> None:
    sys.exit(1)


def _abort(trainer: Any) -> None:
    os.abort()


def _segfault(trainer: Any) -> None:
    ctypes.string_at(0)


def _spoil(trainer: Any) -> None:
    """One weight of this rank is NaN, as of a device that fails."""
    trained = [it for it in trainer.engine.module.parameters() if it.requires_grad]
    trained[0].data.view(-1)[0] = float("nan")


def _go_on(trainer: Any) -> None:
    """Whoever planned it sees that it is time, and kills the whole tree from outside."""


KINDS: dict[str, Callable[[Any], None]] = {
    "kill": _kill,
    "raise": _raise,
    "exit": _exit,
    "abort": _abort,
    "segfault": _segfault,
    "nan": _spoil,
    "tree": _go_on,
}


class Injector:
    """Counts the steps of this attempt and fails at the planned one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        faults = json.loads((folder / "plan.json").read_text())
        fired = [number for number in range(len(faults)) if self.mark(number).exists()]
        self.number = max(fired, default=-1) + 1
        self.fault = faults[self.number] if self.number < len(faults) else None
        self.steps = 0

    def mark(self, number: int) -> Path:
        return self.folder / f"fired-{number}.json"

    def count(self, step: int, trainer: Any) -> None:
        """Called before each step."""
        self.steps += 1
        fault = self.fault
        if fault is None or fault["rank"] != int(os.environ["RANK"]):
            return
        if self.steps == fault["after"]:
            if fault["delay"]:
                given = (step, fault, trainer)
                threading.Thread(target=self.fire, args=given, daemon=True).start()
            else:
                self.fire(step, fault, trainer)

    def fire(self, step: int, fault: dict[str, Any], trainer: Any) -> None:
        time.sleep(fault["delay"])
        fact = {**fault, "step": step, "pid": os.getpid(), "time": time.time()}
        latest = Path(sys.argv[-1]) / "checkpoints" / "LATEST"
        fact["published"] = int(latest.read_text()[5:]) if latest.is_file() else -1
        fact["attempt"] = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        mark = self.mark(self.number)
        # Whole or not there: who waits for it may end this process.
        mark.with_suffix(".tmp").write_text(json.dumps(fact))
        mark.with_suffix(".tmp").replace(mark)
        KINDS[fault["kind"]](trainer)


def patch(module: ModuleType) -> None:
    """Count the steps of the trainer."""
    injector = Injector(Path(os.environ["DTUNE_TEST_FAULTS"]))
    trainer: Any = module.Trainer
    advance = trainer.advance

    def counted(self: Any, step: int, *args: Any, **kwargs: Any) -> Any:
        injector.count(step, self)
        return advance(self, step, *args, **kwargs)

    trainer.advance = counted
