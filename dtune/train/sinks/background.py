"""A tracker on a thread of its own: whatever it does, training neither stops nor waits."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from dtune.runtime.logs import log
from dtune.train.sinks.base import Row, Sink

MAX_WAITING = 1000
"""Rows that wait for a slow tracker; those that find no place are dropped."""

CLOSE_SECONDS = 60.0
"""How long the end of a run waits for a tracker to take what is left."""

HURRY_SECONDS = 5.0
"""The same for a run that was stopped by a signal: the scheduler waits for less."""

FAILED_SECONDS = 1.0
"""The same for a run of several ranks that fails: the others are told afterwards."""

MAX_FAILURES = 3
"""Rows in a row that a tracker may fail to take before it is given up."""


class _Caught:
    """Keeps the error of its block, of whatever class: a tracker may raise anything."""

    error: Exception | None = None

    def __enter__(self) -> _Caught:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


@dataclass(frozen=True)
class TrackerReport:
    """What became of the rows of a tracker; part of result.json."""

    name: str
    dropped: int
    """Rows that it has not taken; metrics.jsonl has them all."""
    error: str
    """The first thing that went wrong; empty where nothing did."""


class BackgroundSink:
    """Hands rows to a tracker that is made, fed and closed on a thread.

    Nothing that the tracker raises comes out, and no call waits for it but ``close``, for a
    limited time. The first error is logged once; rows that it did not take are counted.
    """

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self._name = name
        self._make = make
        self._rows: queue.Queue[Row | None] = queue.Queue(MAX_WAITING)
        self._lock = threading.Lock()
        self._dropped = 0
        self._error = ""
        self._closed = False
        self.close_seconds = CLOSE_SECONDS
        # A daemon: a tracker that hangs does not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name=f"dtune-{name}", daemon=True)
        self._thread.start()

    def write(self, row: Row) -> None:
        """Leave the row to the thread, or drop it."""
        try:
            self._rows.put_nowait(dict(row))
        except queue.Full:
            self._drop(f"it is slower than the run: {MAX_WAITING} rows are waiting for it")

    def close(self) -> None:
        """Wait until the tracker has taken everything, but no longer than ``close_seconds``."""
        deadline = time.monotonic() + self.close_seconds
        while self._thread.is_alive() and time.monotonic() < deadline:
            try:
                self._rows.put(None, timeout=0.05)
            except queue.Full:
                continue
            self._thread.join(max(0.0, deadline - time.monotonic()))
        late = self._thread.is_alive()
        with self._lock:
            self._closed = True
        if late:
            self._fail(f"it did not end within {self.close_seconds:g} s")
        report = self.report()
        if report.error:
            log.warning(
                "%s: %d rows were dropped; metrics.jsonl has them", self._name, report.dropped
            )

    def report(self) -> TrackerReport:
        """How many rows were lost, and why."""
        with self._lock:
            waiting = sum(row is not None for row in self._rows.queue) if self._closed else 0
            return TrackerReport(self._name, self._dropped + waiting, self._error)

    def _drop(self, why: str) -> None:
        with self._lock:
            self._dropped += 1
        self._fail(why)

    def _fail(self, why: str) -> None:
        """Keep and log the first thing that went wrong."""
        with self._lock:
            first, self._error = not self._error, self._error or why
        if first:
            log.warning("%s: %s; the run goes on without it", self._name, why)

    def _run(self) -> None:
        with _Caught() as making:
            sink = self._make()
        if making.error is not None:
            self._give_up(_describe(making.error))
            return
        failures = 0
        while (row := self._rows.get()) is not None:
            with _Caught() as writing:
                sink.write(row)
            failures = 0 if writing.error is None else failures + 1
            if writing.error is not None:
                self._drop(_describe(writing.error))
            if failures == MAX_FAILURES:
                self._give_up(_describe(writing.error))
                return
        with _Caught() as closing:
            sink.close()
        if closing.error is not None:
            self._fail(_describe(closing.error))

    def _give_up(self, why: str) -> None:
        """Drop everything from now on."""
        self._fail(why)
        while self._rows.get() is not None:
            self._drop(why)


def _describe(error: Exception | None) -> str:
    assert error is not None
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]
