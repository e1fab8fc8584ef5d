"""The rank's side of the watchdog. Standard library only, so that it begins before torch."""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from dtune.runtime.logs import log
from dtune.runtime.watch.chair import Cause
from dtune.runtime.watch.heartbeat import NUM_BYTES, Heartbeat, Section, watch_this_process
from dtune.runtime.watch.judge import Limits
from dtune.runtime.watch.schema import WatchConfig
from dtune.runtime.watch.watcher import Orders
from dtune.runtime.watch.wire import Line

TICK_SECONDS = 0.5
_ROOT = Path(__file__).parents[3]
# -I -S: neither the user's environment nor site packages, which take longer to start.
_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from dtune.runtime.watch.watcher import main; main()"
)


def _shared_file() -> int:
    """A file of no name that two processes share; its descriptor."""
    if sys.platform == "linux":
        # Not in /dev/shm: where that is full, the first write would kill the process.
        return os.memfd_create("dtune-watch")
    else:
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())


class Watch:
    """Watches this process; one at a time.

    Made before the process group, so that what hangs there is seen. ``join`` makes the watchers of
    all ranks know each other: then one that hangs is named, and a failure of one ends all.
    """

    def __init__(self, config: WatchConfig, run_dir: str, rank: int) -> None:
        self.cause: Cause | None = None
        self._answer = threading.Event()
        self._port = 0
        self._lock = threading.Lock()
        self._count_calls: Callable[[], Mapping[str, int]] = dict
        self._closing = False
        self._size = 1
        self._failed = False
        ours, theirs = socket.socketpair()
        self._heartbeat_file, self._dump_file = _shared_file(), _shared_file()
        os.ftruncate(self._heartbeat_file, NUM_BYTES)
        self.heartbeat = Heartbeat(self._heartbeat_file)
        self.heartbeat.enter(Section.start)
        self.heartbeat.tick({})
        orders = Orders(
            rank=rank,
            pid=os.getpid(),
            host=socket.gethostname(),
            run_dir=run_dir,
            control=theirs.fileno(),
            heartbeat=self._heartbeat_file,
            dump=self._dump_file,
            limits=_limits(config),
            slow_factor=config.slow_factor,
            silent=config.silent,
        )
        self._rank = rank
        self._process = _start_watcher(orders)
        theirs.close()
        self._control = Line(ours)
        faulthandler.register(signal.SIGUSR2, file=self._dump_file, all_threads=True, chain=False)
        watch_this_process(self.heartbeat)
        self._thread = threading.Thread(target=self._serve, name="dtune-watch", daemon=True)
        self._thread.start()

    def listen(self, *, local: bool) -> int:
        """Let the watcher of the first rank wait for the others, of this machine or of any.

        Returns its port.
        """
        self._control.send("listen", local=local)
        assert self._answer.wait(60), "the watcher of this rank does not answer"
        return self._port

    def meet(self, size: int, *, address: str = "", port: int = 0, secret: str = "") -> None:
        """Let the watcher of this rank call that of the first one, and be one of ``size``."""
        self._size = size
        self._control.send("join", size=size, address=address, port=port, secret=secret)

    def count(self, calls: Callable[[], Mapping[str, int]]) -> None:
        """Tell of collective calls by group from now on; asked twice a second by a thread."""
        self._count_calls = calls

    def failed(self, message: str, *, trace: str, step: int) -> None:
        """Tell all ranks that this one has failed; they end within seconds, this one last."""
        self._failed = True
        if self._size > 1:
            cause = Cause(self._rank, message, step, trace=trace)
            with self._lock:
                self._control.send("failed", cause=vars(cause))

    def wait_for_cause(self, seconds: float) -> Cause | None:
        """What ended the run elsewhere, if another rank says so in time."""
        deadline = time.monotonic() + seconds
        while self.cause is None and time.monotonic() < deadline and self._size > 1:
            time.sleep(0.02)
        return self.cause

    def close_if_done(self) -> None:
        """Leave, unless this rank of several has failed: then its watcher sees to its end."""
        if self._size == 1 or not self._failed:
            self.close()

    def stop_counting(self) -> None:
        """Look at no process groups any more, before they are destroyed."""
        self._count_calls = dict

    def close(self) -> None:
        """Leave in good order; nobody watches this process any more."""
        self._closing = True
        watch_this_process(None)
        faulthandler.unregister(signal.SIGUSR2)
        with self._lock:
            self._control.send("bye")
        if self._size == 1:
            self._process.wait(timeout=30)
        self._thread.join(timeout=5)
        self._control.close()
        for descriptor in (self._heartbeat_file, self._dump_file):
            os.close(descriptor)

    def _serve(self) -> None:
        """Show that Python runs, count collective calls, and hear what the watcher says."""
        poller = select.poll()
        poller.register(self._control.fileno(), select.POLLIN)
        while not self._closing:
            self.heartbeat.tick(self._count_calls())
            if not poller.poll(1000 * TICK_SECONDS):
                continue
            messages = self._control.receive()
            if messages is None:
                if not self._closing:
                    log.error("the watcher of rank %d is gone: it is not watched", self._rank)
                return
            for message in messages:
                if message["kind"] == "listening":
                    self._port = message["port"]
                    self._answer.set()
                elif message["kind"] == "alone":
                    log.warning("rank %d is watched alone: %s", self._rank, message["why"])
                elif message["kind"] == "end":
                    self.cause = Cause(**message["cause"])
                    self._end_after(message["grace"])

    def _end_after(self, seconds: float) -> None:
        """End this process, whatever its main thread waits for."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.heartbeat.tick({})
            time.sleep(0.1)
        os._exit(1)


def _limits(config: WatchConfig) -> Limits:
    names = ("start", "first_step", "step", "save", "evaluation", "step_factor")
    given = asdict(config)
    return Limits(**{name: given[name] for name in names})


def _start_watcher(orders: Orders) -> subprocess.Popen[bytes]:
    text = json.dumps(asdict(orders))
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _PROGRAM, str(_ROOT), text],
        pass_fds=(orders.control, orders.heartbeat, orders.dump),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
