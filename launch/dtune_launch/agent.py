"""torchrun's agent without its page-long traceback; takes torchrun's own arguments.

The only module here that imports torch: it runs in a process of its own, beside the ranks. It
must be started with SIGUSR1 ignored, which kills it otherwise until it can pass it on to its ranks.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from dtune.runtime.imports import uncollected

if __name__ == "__main__":
    with uncollected():
        importlib.import_module("torch.distributed.run")

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import api
from torch.distributed.elastic.multiprocessing.api import SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher import api as launcher_api
from torch.distributed.run import parse_args, run

from dtune.runtime.status import FAILURES, State, Status, read_status, write_status
from dtune_launch.torchrun import node_options

CONFIG_ERROR = 2
"""Exit code of a rank that trying again does not help."""

TOLD_SECONDS = 1.0
"""What a rank that fails, or its watcher, has to say itself why: they know more."""

LEAVE_SECONDS = 20.0
"""What the agent has to leave the others in good order once its ranks have failed for good."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun; the exit code of the rank that failed first, or 0."""
    signal.signal(signal.SIGUSR1, _pass_on)
    _quiet()
    # The name by which torchrun's own code makes its agent.
    vars(launcher_api)["LocalElasticAgent"] = Agent
    given = sys.argv[1:] if arguments is None else arguments
    logs = next((word for word in given if word.startswith("--log-dir=")), None)
    if logs is not None:
        Agent.run_dir = Path(logs.removeprefix("--log-dir=")).parent
    try:
        run(parse_args([*node_options(os.environ), *given]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.stderr.write(f"rank {rank} {_how(failure.exitcode)}\n")
        return _exit_code(failure.exitcode)
    except SignalException as error:
        return 128 + int(error.sigval)
    except RendezvousError as error:
        sys.stderr.write(f"dtune: the machines of this run do not find together: {error}\n")
        return 1
    return 0


class Agent(LocalElasticAgent):
    """torchrun's agent, which does not start ranks again that have ended by a wrong config.

    After its ranks have failed for good it leaves soon, also where it cannot reach the others.
    """

    _is_watched = False
    _started = 0.0
    """When the ranks of this attempt were, in seconds since the epoch."""

    running: Agent | None = None
    """The one of this process, once it has ranks."""

    run_dir: Path | None = None
    """Of the run, where it has one; its status may be what a rank of another node has written."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.failures and self._is_hopeless(result):
            self._remaining_restarts = 0
        return result

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        # Ranks inherit it blocked: one that comes early waits for their handler.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        self._started = time.time()
        try:
            started: dict[int, Any] = super()._start_workers(worker_group)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        Agent.running = self
        context = self._pcontext
        assert context is not None
        ranks = [worker.global_rank for worker in worker_group.workers]
        vars(context)["close"] = partial(self._close, context.close, ranks)
        if not self._is_watched:
            self._is_watched = True
            threading.Thread(target=self._leave_in_the_end, daemon=True).start()
        return started

    def pass_on(self, number: int) -> None:
        """Send a signal to the ranks of this machine."""
        context = self._pcontext
        if isinstance(context, SubprocessContext):
            for handler in context.subprocess_handlers.values():
                if handler.proc.poll() is None:
                    handler.proc.send_signal(number)

    def _close(
        self, close: Callable[..., None], ranks: Sequence[int], *arguments: Any, **named: Any
    ) -> None:
        """End the ranks; where one has failed, the status tells of it before.

        Others that are only starting would take the SIGTERM for one from outside, and say that
        the run was preempted: then it would not be started again.
        """
        failed = [(r, code) for r, code in zip(ranks, self._exit_codes(), strict=True) if code]
        if failed:
            self._tell(*failed[0])
        close(*arguments, **named)

    def _tell(self, rank: int, code: int) -> None:
        deadline = time.monotonic() + TOLD_SECONDS
        while (told := self._status()) is not None and (
            told.state is State.running or (told.state in FAILURES and told.time < self._started)
        ):
            if time.monotonic() > deadline:
                assert self.run_dir is not None
                message = f"rank {rank} {_how(code)} before it had met the others"
                failed = Status(State.failed, rank=rank, message=message)
                write_status(self.run_dir, failed, since=self._started)
            time.sleep(0.02)

    def _leave_in_the_end(self) -> None:
        """End this process some time after its ranks have failed for good.

        torchrun asks the store of the head about the other machines all the time: where that is
        cut off, it waits for minutes, and does not see how its own ranks end.
        """
        deadline = time.monotonic() + LEAVE_SECONDS
        while True:
            time.sleep(1.0)
            codes = self._exit_codes()
            failed = next((code for code in codes if code), None)
            if failed is None or None in codes or self._remaining_restarts > 0:
                deadline = time.monotonic() + LEAVE_SECONDS
            elif time.monotonic() > deadline:
                os._exit(_exit_code(failed))

    def _exit_codes(self) -> list[int | None]:
        """Of the ranks of this machine; None for one that runs."""
        context = self._pcontext
        if not isinstance(context, SubprocessContext):
            return []
        return [handler.proc.poll() for handler in context.subprocess_handlers.values()]

    def _is_hopeless(self, result: RunResult) -> bool:
        if any(failure.exitcode == CONFIG_ERROR for failure in result.failures.values()):
            return True
        told = self._status()
        return told is not None and (told.hopeless or told.state is State.config_error)

    def _status(self) -> Status | None:
        """How the run stands; None where nobody has said it, or a full disk has cut it off."""
        try:
            return None if self.run_dir is None else read_status(self.run_dir)
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            return None


def _pass_on(number: int, frame: FrameType | None) -> None:
    """Slurm may tell only the tasks that it has started, and not what these have."""
    if Agent.running is not None:
        Agent.running.pass_on(number)


def _exit_code(code: int) -> int:
    """Of a rank, as a shell says it: 128 + n where signal n ended it."""
    return code if code >= 0 else 128 - code


def _how(code: int) -> str:
    return f"exited with {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


def _quiet() -> None:
    """Let torchrun log nothing but which rank ended an attempt, in a line."""
    logging.disable(logging.WARNING)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    watcher = logging.getLogger(api.__name__)
    watcher.handlers, watcher.propagate = [_Ended()], False
    watcher.setLevel(logging.ERROR)


class _Ended(logging.Handler):
    """Says how the first rank to end did; torchrun itself says it only of the last attempt."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line; other records of this logger are about processes it could not stop."""
        if record.msg.startswith("failed (exitcode") and isinstance(record.args, tuple):
            code, local_rank = record.args[:2]
            assert isinstance(code, int)
            sys.stderr.write(f"attempt ended: rank {local_rank} of this machine {_how(code)}\n")
        else:
            sys.stderr.write(f"{record.getMessage()}\n")


if __name__ == "__main__":
    sys.exit(main())
