"""A rank of a run with a fault put in: ``python -m tests.faults.watch_worker RUN``.

``DTUNE_TEST_FAULT`` says which, on which rank, in which step: ``sleep,1,3``. And
``python -m tests.faults.watch_worker launch KEY=VALUE...`` is ``dtune train`` with such ranks.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dtune.runtime.imports import uncollected

if __name__ == "__main__" and sys.argv[1] != "launch":
    # As a worker does; what launches needs no torch.
    with uncollected():
        importlib.import_module("dtune.assemble")


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _sleep() -> None:
    time.sleep(100_000)


def _gil() -> None:
    # PyDLL keeps Python's lock for the time of the call, and a mutex cannot be locked twice.
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)


def _out_of_memory() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


IN_STEP: dict[str, Callable[[], None]] = {
    "stop": _stop,
    "sleep": _sleep,
    "gil": _gil,
    "oom": _out_of_memory,
}


def before(owner: Any, name: str, act: Callable[[], None], *, call: int) -> None:
    """Do ``act`` before call number ``call`` of a method, counted from 1."""
    method, calls = getattr(owner, name), itertools.count(1)

    def patched(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            # For the test, which measures from here.
            Path(sys.argv[1], "fault").touch()
            act()
        return method(*args, **kwargs)

    setattr(owner, name, patched)


def inject(kind: str, at: int) -> None:
    """Put the fault in, at a step counted from 1; a step has two micro batches."""
    from dtune.checkpoint.writer import Checkpointer
    from dtune.data.loader import Loader
    from dtune.objectives.sft import Sft

    if kind in IN_STEP:
        before(Sft, "loss", IN_STEP[kind], call=2 * at)
    elif kind == "batches":
        before(Loader, "batches", threading.Event().wait, call=at)
    elif kind == "save":
        before(Checkpointer, "save", _sleep, call=1)
    else:
        raise AssertionError(kind)


def launch(overrides: Sequence[str]) -> int:
    """``dtune train``, with ranks that run this module."""
    from dtune_launch.spec import JobSpec

    from dtune.commands.train import launch as launch_job
    from dtune.config.compose import compose_overrides
    from dtune.config.freeze import load_frozen
    from dtune.run_folder import occupied_run_folder
    from dtune.runtime.signals import StopRequest

    text = compose_overrides("train", overrides)
    config = load_frozen(text)
    job = JobSpec(
        module="tests.faults.watch_worker",
        arguments=(config.run_dir,),
        run_dir=Path(config.run_dir),
        nproc=int(config.launch.nproc),
        max_restarts=config.launch.max_restarts,
    )
    with occupied_run_folder(config, text, command=["dtune", "train", *overrides]):
        return launch_job(job, config.launch, StopRequest())


def main() -> int:
    if sys.argv[1] == "launch":
        return launch(sys.argv[2:])
    kind, rank, at = os.environ.get("DTUNE_TEST_FAULT", "none,0,0").split(",")
    first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if kind != "none" and int(rank) == int(os.environ["RANK"]) and first_attempt:
        inject(kind, int(at))
    # For the test, which looks when it ends.
    Path(sys.argv[1], f"process-{os.environ['RANK']}").write_text(str(os.getpid()))
    from dtune.worker import main as work

    return work([sys.argv[1]])


if __name__ == "__main__":
    sys.exit(main())
