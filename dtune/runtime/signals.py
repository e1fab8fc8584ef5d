"""Signals that ask a run to save and stop. Imports the standard library only."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from dtune.runtime.status import EXIT_CODES, FAILURES, State, Status, status_of, write_status

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

SAME_REQUEST_SECONDS = 5.0
"""What comes so soon after a first signal is the same request: a scheduler and a launcher may both
send it."""

GRACE_SECONDS = 10.0
"""How long a process that has nothing to save may take to leave before it is ended."""


class Preempted(SystemExit):
    """A signal came before there was anything to save; ends the process as preempted."""


class StopRequest:
    """Set by SIGTERM, SIGUSR1 and Ctrl-C.

    While a run is being prepared (``at_once``), the process leaves with status preempted as soon
    as Python can run, and after a while also where it cannot: there is nothing to save. Later the
    request is read where all ranks agree on it. A second Ctrl-C interrupts at once, as usual.
    """

    def __init__(self) -> None:
        self.created = time.time()
        self.signal_name = ""
        self.in_a_hurry = False
        """A second request came: nothing more is begun, what is being saved is finished."""
        self._run_dir: Path | None = None
        self._at_once = False
        self._asked_at = 0.0
        self._wakeup: socket.socket | None = None

    @property
    def is_set(self) -> bool:
        """Whether a signal came."""
        return bool(self.signal_name)

    @property
    def urgency(self) -> int:
        """0: go on, 1: save and stop, 2: stop."""
        return self.is_set + self.in_a_hurry

    @property
    def ends_at_once(self) -> bool:
        """Whether the run is still being prepared."""
        return self._at_once

    def install(self, *, at_once: bool = False, run_dir: str | Path | None = None) -> None:
        """Take over the signals in this process; the last call counts.

        ``run_dir`` is the run whose status is preempted from then on where a signal ends it at
        once. Only in the main thread. Signals that were blocked until now come in.
        """
        if run_dir is not None:
            self._run_dir = Path(run_dir)
        self._at_once = at_once
        for number in SIGNALS:
            signal.signal(number, self._handle)
        if at_once and self._wakeup is None:
            self._watch()
        elif not at_once:
            self._unwatch()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if at_once and self.is_set:
            self._leave()

    @contextmanager
    def in_charge(self) -> Iterator[StopRequest]:
        """Take over the signals for the block, at first as ``at_once``; then give them back."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.install(at_once=True)
        try:
            yield self
        finally:
            self._unwatch()
            self._at_once = False
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.is_set:
            self.signal_name, self._asked_at = signal.Signals(number).name, now
        elif now - self._asked_at > SAME_REQUEST_SECONDS:
            self.in_a_hurry = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._at_once:
            self._leave()

    def _leave(self) -> None:
        self._say_preempted()
        raise Preempted(exit_code(State.preempted))

    def _say_preempted(self) -> None:
        text = f"dtune: stopped by {self.signal_name or 'a signal'} with nothing to save yet\n"
        os.write(2, text.encode())
        folder = self._run_dir
        if folder is None or not (folder / "status.json").is_file():
            return
        before, _ = status_of(folder)
        # torchrun may just be starting the ranks again.
        of_before = before.state in FAILURES and before.time < self.created
        if before.state is State.running or of_before:
            status = Status(State.preempted, step=_saved_step(folder))
            write_status(folder, status, since=self.created)

    def _watch(self) -> None:
        """See to it that the process also leaves where Python waits in a library.

        Such as for ranks that never come: a handler runs only once the library returns.
        """
        reader, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        threading.Thread(
            target=self._end, args=(reader,), name="dtune-signals", daemon=True
        ).start()

    def _unwatch(self) -> None:
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            self._wakeup.close()
            self._wakeup = None

    def _is_ours(self, number: int) -> bool:
        """Whether a signal is one to leave by, which nobody has taken over since.

        Such as a launcher, which passes it on and waits for its processes to save.
        """
        if number not in SIGNALS:
            return False
        return signal.getsignal(number) in (self._handle, signal.default_int_handler)

    def _end(self, reader: socket.socket) -> None:
        # A signal that the main thread holds back must wait, and not come in here.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        with reader:
            came = reader.recv(1)
            while came and not self._is_ours(came[0]):
                came = reader.recv(1)
        if not came:
            return  # The run has begun.
        time.sleep(GRACE_SECONDS)
        if self._at_once:
            self._say_preempted()
            sys.stderr.flush()
            os._exit(exit_code(State.preempted))


OF_THIS_PROCESS = StopRequest()
"""For what takes signals over before all else is imported."""


def exit_code(state: State) -> int:
    """Exit code of a rank.

    torchrun takes any but 0 for a failure and would start the ranks again, and srun would kill the
    others; what it was is in status.json, by which ``dtune train`` and the job's script answer.
    """
    flattened = "TORCHELASTIC_RUN_ID" in os.environ or "DTUNE_SRUN" in os.environ
    if state is State.preempted and flattened:
        return 0
    return EXIT_CODES[state]


def _saved_step(folder: Path) -> int:
    """Step of the newest checkpoint of a run folder; 0 without one."""
    latest = folder / "checkpoints" / "LATEST"
    name = latest.read_text(encoding="utf-8").strip() if latest.is_file() else ""
    number = name.removeprefix("step-")
    return int(number) if number.isdigit() else 0
