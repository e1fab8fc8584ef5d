"""Signals that ask a run to save and stop."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Set by SIGTERM, SIGUSR1 and Ctrl-C; read at step boundaries.

    Nothing happens inside the handler. A second Ctrl-C interrupts at once, as usual.
    """

    def __init__(self) -> None:
        self.signal_name = ""

    def install(self) -> None:
        """Take over the signals in this process."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def is_set(self) -> bool:
        """Whether a signal came."""
        return bool(self.signal_name)
