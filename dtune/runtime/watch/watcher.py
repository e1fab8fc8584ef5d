"""The process beside a rank: watches it, and with the watchers of the other ranks the run.

Standard library only: it starts in the time that Python takes, and stays small. The watcher of the
first rank hears the others and decides; each of them ends its own rank when told to, or when it is
left alone.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtune.runtime.status import State, Status, status_of, write_status
from dtune.runtime.watch.chair import Cause, Chair
from dtune.runtime.watch.heartbeat import Heartbeat
from dtune.runtime.watch.judge import Limits, Report
from dtune.runtime.watch.stacks import process_state, write_stacks
from dtune.runtime.watch.wire import Line, Message

POLL_SECONDS = 0.5
# A loop that was away for so long was stopped itself, and so was what it watches.
SUSPENDED_SECONDS = 10.0
# What a rank that is told to end has before it is killed.
KILL_SECONDS = 1.5
CONNECT_SECONDS = 30.0


@dataclass(frozen=True)
class Orders:
    """What a watcher is started with."""

    rank: int
    pid: int
    host: str
    run_dir: str
    control: int
    heartbeat: int
    dump: int
    limits: Limits
    slow_factor: float
    silent: float

    @classmethod
    def of_text(cls, text: str) -> Orders:
        """From the command line."""
        record: dict[str, Any] = json.loads(text)
        return cls(**{**record, "limits": Limits(**record["limits"])})


class Watcher:
    """One rank's watcher; ``run`` returns when there is nothing left to watch."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.heartbeat = Heartbeat(orders.heartbeat)
        self.control = Line(socket.socket(fileno=orders.control))
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.control, selectors.EVENT_READ, "control")
        self.chair: Chair | None = None
        self._server: socket.socket | None = None
        self.up: Line | None = None
        """To the watcher of the first rank, where that is another one."""
        self._alone: Chair | None = None
        """What decides for this rank where it has not met the others."""
        self.ended = False
        """Whether the rank has left the run in good order, or is dead."""
        self._finished = False
        self._kill_at = float("inf")
        self._forgiven = self._last_poll = self._heard = time.monotonic()

    def run(self) -> None:
        """Watch until the rank, and what this watcher decides for others, is over."""
        while not self._finished:
            for key, _ in self.selector.select(POLL_SECONDS):
                self._on_readable(key.data, key.fileobj)
            self._on_time()

    def _on_readable(self, role: str, file: Any) -> None:
        if role == "listener":
            connection, _ = file.accept()
            line = Line(connection)
            self.selector.register(line, selectors.EVENT_READ, "peer")
            return
        messages = file.receive()
        if messages is None:
            self.selector.unregister(file)
            if role == "control":
                self._on_rank_gone()
            elif role == "up":
                self._on_left_alone("the watcher of rank 0 is gone, with its machine perhaps")
            elif self.chair is not None:
                self.chair.on_peer_gone(file)
                file.close()
            return
        for message in messages:
            if role == "control":
                self._on_control(message)
            elif role == "up":
                self._on_order(message)
            elif self.chair is not None and not self.chair.on_peer(file, message):
                # A stranger: it does not know the secret.
                self.selector.unregister(file)
                file.close()
                return

    def _on_control(self, message: Message) -> None:
        kind = message["kind"]
        if kind == "listen":
            self._listen(local=message["local"])
        elif kind == "join":
            self._join(message)
        elif kind == "failed":
            cause = Cause(**message["cause"])
            if self.up is not None:
                self.up.send("failed", cause=vars(cause))
            elif self.chair is not None:
                self.chair.on_failed(cause)
        elif kind == "bye":
            self._on_bye()

    def _listen(self, *, local: bool) -> None:
        both = not local and socket.has_dualstack_ipv6()
        self._server = socket.create_server(
            ("127.0.0.1" if local else "", 0),
            family=socket.AF_INET6 if both else socket.AF_INET,
            dualstack_ipv6=both,
            backlog=1024,
        )
        self.control.send("listening", port=self._server.getsockname()[1])

    def _join(self, message: Message) -> None:
        if self.orders.rank == 0:
            self.chair = Chair(self, size=message["size"], secret=message.get("secret", ""))
            if self._server is not None:
                # Not sooner: what others say before there is a chair would be heard by nobody.
                self.selector.register(self._server, selectors.EVENT_READ, "listener")
            return
        try:
            address = (message["address"], message["port"])
            connection = socket.create_connection(address, timeout=CONNECT_SECONDS)
        except OSError as error:
            # Watched all the same, but what it says is not heard by the others.
            self.control.send("alone", why=f"{address[0]} port {address[1]}: {error}")
            return
        self.up = Line(connection)
        self.up.send("hello", rank=self.orders.rank, secret=message["secret"])
        self.up.send("report", report=self.report().record())
        self._heard = time.monotonic()
        self.selector.register(self.up, selectors.EVENT_READ, "up")

    def _on_bye(self) -> None:
        self.ended = True
        if self.up is not None:
            self.up.send("bye", report=self.report().record())
        if self.chair is None:
            self._finished = True
        else:
            self.chair.on_own_end()

    def _on_rank_gone(self) -> None:
        if self.ended:
            return
        self.ended = True
        if self._kill_at < float("inf") or self._says(State.preempted):
            if self.up is not None:
                self.up.send("bye", report=self.report().record())
            self._finish()
            return
        message = (
            f"rank {self.orders.rank} ({self.orders.host}, process {self.orders.pid}) ended "
            f"without a word in {self.heartbeat.read().where}: it was killed, or it crashed"
        )
        cause = Cause(self.orders.rank, message, step=self.heartbeat.read().step)
        if self.up is not None:
            self.up.send("failed", cause=vars(cause))
        if self.chair is not None:
            self.chair.on_failed(cause)
        elif self.up is None and self._says(State.running):
            # Nobody to tell: it has not met the others.
            self.write(State.failed, cause)
        self._finish()

    def _says(self, state: State) -> bool:
        """How the run stands: preempted, where a rank has left because a signal asked for it."""
        told = Path(self.orders.run_dir) / "status.json"
        try:
            return told.is_file() and status_of(self.orders.run_dir)[0].state is state
        except OSError:
            return False

    def _finish(self) -> None:
        """Stop once the others need nothing more from here."""
        if self.chair is None:
            self._finished = True
        else:
            self.chair.on_own_end()

    def finish(self) -> None:
        """Stop after this round."""
        self._finished = True

    def _on_left_alone(self, why: str) -> None:
        self.up = None
        if self.ended:
            self._finished = True
            return
        cause = Cause(0, f"rank {self.orders.rank} was left alone: {why}")
        self.write(State.failed, cause)
        self.end_rank(cause, grace=0.0)

    def _on_order(self, message: Message) -> None:
        self._heard = time.monotonic()
        kind = message["kind"]
        if kind == "dump":
            shown = self.dump(message["heading"])
            if self.up is not None:
                self.up.send("dumped", shown=shown, report=self.report().record())
        elif kind == "end":
            self.end_rank(Cause(**message["cause"]), grace=message["grace"])

    def _on_time(self) -> None:
        now = time.monotonic()
        if now - self._last_poll > SUSPENDED_SECONDS:
            self._forgiven = self._heard = now
        self._last_poll = now
        if not self.ended and process_state(self.orders.pid) in ("", "Z", "X"):
            self._on_rank_gone()
        if now > self._kill_at:
            if not self.ended:
                self._kill()
            self._kill_at = float("inf")
            self.ended = True
            self._finish()
            return
        if self.chair is not None:
            self.chair.on_time(now, forgiven=self._forgiven)
        elif self.up is not None:
            self._report_up(now)
        elif not self.ended and self._kill_at == float("inf"):
            self._judge_alone()

    def _report_up(self, now: float) -> None:
        assert self.up is not None
        self.up.send("report", report=self.report().record())
        if self.orders.silent and now - self._heard > self.orders.silent:
            self.selector.unregister(self.up)
            self._on_left_alone(f"nothing was heard from rank 0 for {self.orders.silent:.0f} s")

    def _judge_alone(self) -> None:
        """A rank that has not met the others yet, or cannot: it decides for itself."""
        if self.chair is None and self._alone is None:
            self._alone = Chair(self, size=1, secret="", met=False)
        if self._alone is not None:
            self._alone.on_time(time.monotonic(), forgiven=self._forgiven)

    def report(self) -> Report:
        """How the rank is."""
        orders = self.orders
        signs = self.heartbeat.read()
        state = process_state(orders.pid)
        return Report(orders.rank, orders.host, orders.pid, signs, state, self.ended)

    def dump(self, heading: str) -> str:
        """Write the stacks of the rank; the innermost frames."""
        path = Path(self.orders.run_dir) / "logs" / f"stacks-rank-{self.orders.rank}.txt"
        try:
            return write_stacks(path, self.orders.pid, self.orders.dump, heading)
        except OSError as error:
            self.say(f"{path} was not written: {error.strerror}")
            return ""

    def end_rank(self, cause: Cause, *, grace: float) -> None:
        """Have the rank end itself after ``grace`` seconds, and kill it where it does not."""
        self._alone = None
        if self.ended:
            self._finish()
            return
        self.control.send("end", cause=vars(cause), grace=grace)
        self._kill_at = min(self._kill_at, time.monotonic() + grace + KILL_SECONDS)

    def write(self, state: State, cause: Cause) -> None:
        """The status of the run, unless it already tells of a failure, or that it was preempted."""
        if state is State.failed and self._says(State.preempted):
            # What happens to the ranks that a preempted one has left is its echo.
            return
        status = Status(
            state, step=cause.step, rank=cause.rank, message=cause.message, section=cause.section
        )
        try:
            write_status(self.orders.run_dir, status)
        except OSError as error:
            self.say(f"{self.orders.run_dir}/status.json was not written: {error.strerror}")

    def say(self, text: str) -> None:
        """Tell the terminal of the first rank, and ``RUN/logs/watch.log``."""
        line = f"dtune: {text}\n"
        try:
            sys.stderr.write(line)
            sys.stderr.flush()
        except OSError:
            return  # The terminal has gone; the run need not end for that.
        finally:
            self._log(line)

    def _log(self, line: str) -> None:
        path = Path(self.orders.run_dir) / "logs" / "watch.log"
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")
        except OSError:
            return  # A disk that is full or away: the terminal has it, and the run is to end.

    def _kill(self) -> None:
        try:
            os.kill(self.orders.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # It has just ended.


def main() -> None:
    """``python -c ... ORDERS``: watch until the rank is over."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        # They are meant for the rank.
        signal.signal(number, signal.SIG_IGN)
    Watcher(Orders.of_text(sys.argv[1])).run()
