"""A process that behaves as a rank does towards the watchdog, without torch: it starts at once.

``python -m tests.faults.watched_rank RUN SIZE RANK FAULT``, where the fault is ``kind,rank,step``.
Its collective calls are files that all ranks wait for.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dtune.runtime.watch import heartbeat
from dtune.runtime.watch.client import Watch
from dtune.runtime.watch.heartbeat import Place, Section
from dtune.runtime.watch.schema import WatchConfig

STEPS = 6
SLOW_STEPS = 20
STEP_SECONDS = 6.0
OTHER_SECONDS = 5.0
"""Time-out of saves and evaluations, and of the start where a rank hangs there."""


def stop_by_signal() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep_for_ever() -> None:
    time.sleep(100_000)


def hold_the_lock_of_python() -> None:
    # PyDLL keeps Python's lock for the time of the call, and a mutex cannot be locked twice.
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)


def sleep_until_a_signal() -> None:
    ctypes.PyDLL(None).sleep(100_000)


def wait_for_a_batch() -> None:
    threading.Event().wait()


def end_without_a_word() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


FAULTS: dict[str, Callable[[], None]] = {
    "stop": stop_by_signal,
    "sleep": sleep_for_ever,
    "gil": hold_the_lock_of_python,
    "cured": sleep_until_a_signal,
    "kill": end_without_a_word,
}


class Rank:
    """One of ``size`` processes that train nothing."""

    def __init__(self, run_dir: Path, rank: int, size: int, fault: str) -> None:
        self.run_dir, self.rank, self.size = run_dir, rank, size
        self.kind, guilty, at = fault.split(",")
        self.is_guilty, self.at = rank == int(guilty), int(at)
        self.fault = self.kind if self.is_guilty else "none"
        config = WatchConfig(
            start=OTHER_SECONDS if self.kind == "start" else 60,
            first_step=30,
            step=STEP_SECONDS,
            save=OTHER_SECONDS,
            evaluation=OTHER_SECONDS,
            step_factor=0,
            silent=10,
        )
        self.watch = Watch(config, str(run_dir), rank)
        self.calls = 0

    def come(self) -> None:
        """Wait until all processes are there."""
        (self.run_dir / f"started-{self.rank}").touch()
        if self.fault == "start":
            sleep_for_ever()
        (self.run_dir / f"here-{self.rank}").touch()
        self.watch.heartbeat.at(Place.others)
        for other in range(self.size):
            self.wait_for(self.run_dir / f"here-{other}")
        self.watch.heartbeat.at(Place.nowhere)

    def join(self) -> None:
        path = self.run_dir / "port"
        if self.rank == 0:
            port = self.watch.listen(local=True)
            path.with_name("port.tmp").write_text(str(port))
            path.with_name("port.tmp").rename(path)
        self.wait_for(path)
        port = int(path.read_text())
        self.watch.meet(self.size, address="127.0.0.1", port=port, secret="s")
        self.watch.count(lambda: {"all": self.calls})

    def wait_for(self, path: Path) -> None:
        while not path.exists():
            time.sleep(0.01)

    def meet_all(self) -> None:
        """A collective call."""
        self.calls += 1
        (self.run_dir / f"call-{self.rank}-{self.calls}").touch()
        for other in range(self.size):
            self.wait_for(self.run_dir / f"call-{other}-{self.calls}")

    def step(self, step: int) -> None:
        if self.fault == "batch" and step == self.at:
            wait_for_a_batch()
        heartbeat.begin_step(step)
        heartbeat.at(Place.forward)
        started = time.perf_counter()
        if self.fault in FAULTS and step == self.at:
            FAULTS[self.fault]()
        if self.fault == "suspended" and step == self.at:
            self.be_quiet()
        if self.fault == "fail" and step == self.at:
            self.watch.failed("a rank fails", trace="Traceback: here", step=step)
            sleep_for_ever()
        time.sleep(0.5 if self.fault == "slow" else 0.05)
        own = time.perf_counter() - started
        heartbeat.at(Place.backward)
        self.meet_all()
        heartbeat.end_step(own, time.perf_counter() - started)
        heartbeat.at(Place.batch)

    def be_quiet(self) -> None:
        """Give no sign of life for less than a step may take, in time that this process has."""
        # The other rank is quiet as well from here on.
        self.wait_for(self.run_dir / f"call-0-{self.calls + 1}")
        for number in range(35):
            if number == 10:
                (self.run_dir / "is-quiet").touch()
            time.sleep(0.1)

    def between_steps(self, kind: str) -> None:
        """A save or an evaluation, in which ranks meet as well."""
        with heartbeat.section(Section[kind]):
            if self.is_guilty:
                sleep_for_ever()
            self.meet_all()

    def train(self) -> None:
        steps = SLOW_STEPS if self.kind == "slow" else STEPS
        steps = self.at if self.fault == "unequal" else steps
        heartbeat.enter(Section.first_step)
        for step in range(1, steps + 1):
            self.step(step)
            if self.kind in ("save", "evaluation") and step == self.at:
                self.between_steps(self.kind)
        heartbeat.enter(Section.save)
        # What ranks say to each other at the end goes over another group.
        (self.run_dir / f"end-{self.rank}").touch()
        for other in range(self.size):
            self.wait_for(self.run_dir / f"end-{other}")


def main() -> None:
    run_dir, size, rank, fault = sys.argv[1:]
    it = Rank(Path(run_dir), int(rank), int(size), fault)
    it.come()
    it.join()
    it.train()
    it.watch.close()


if __name__ == "__main__":
    main()
