"""Waiting for trials that other processes run: jobs of SLURM, or what a dead launcher left."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from dtune.runtime.signals import SIGNALS
from dtune.sweep.folder import mark_pruned
from dtune.sweep.local import Watch, say
from dtune.sweep.standing import RUNNING, Standing, SweepView, line_of


def wait_for(
    view: SweepView,
    numbers: Collection[int],
    *,
    poll_seconds: float,
    watch: Watch | None = None,
    ask_to_stop: Callable[[Path], None] | None = None,
) -> bool:
    """Wait until these trials are over; a line as each ends. False if a signal ended the wait.

    The trials themselves are not stopped by that. One that the watch judges hopeless is asked to
    stop.
    """
    told: set[int] = set()
    asked: set[int] = set()
    objective = view.record.objective
    with _noting_signals() as received:
        while not received:
            standings = [one for one in view.look() if one.number in numbers]
            for one in standings:
                if one.is_over and one.number not in told:
                    told.add(one.number)
                    say(line_of(one, objective))
                elif ask_to_stop and one.number not in asked and _is_hopeless(view, one, watch):
                    asked.add(one.number)
                    ask_to_stop(one.folder)
            if len(told) == len(standings):
                return True
            time.sleep(poll_seconds)
    return False


def _is_hopeless(view: SweepView, standing: Standing, watch: Watch | None) -> bool:
    """Whether the watch gives a trial up; then that is recorded."""
    if watch is None or standing.state != RUNNING:
        return False
    pruned = watch.judge(standing.number, view.evaluations(standing.folder))
    if pruned:
        mark_pruned(standing.folder, pruned)
    return pruned is not None


@contextmanager
def _noting_signals() -> Iterator[list[int]]:
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
