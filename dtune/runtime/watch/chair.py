"""What the watcher of the first rank does for all: hears their reports, and decides."""

from __future__ import annotations

import hmac
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dtune.runtime.status import State
from dtune.runtime.watch.heartbeat import Signs
from dtune.runtime.watch.judge import Report, Verdict, find_slow, judge
from dtune.runtime.watch.wire import Line, Message

if TYPE_CHECKING:
    from dtune.runtime.watch.watcher import Watcher

# What ranks have to end by themselves after another one failed: most will raise what it raised.
GRACE_SECONDS = 3.0
# What the rank that failed has to say why, with what would help.
OWN_GRACE_SECONDS = 8.0
DUMP_SECONDS = 5.0
PING_SECONDS = 1.0
# Rounds in which a hang must be seen: a number may be read while it is written.
ROUNDS = 2
# Slow ranks are looked for in so many seconds and steps, and told of this often.
SLOW_SECONDS = 5.0
SLOW_STEPS = 5
SLOW_AGAIN_SECONDS = 300.0


@dataclass(frozen=True)
class Cause:
    """Why a run ends."""

    rank: int
    message: str
    step: int = 0
    section: str = ""
    trace: str = ""


class Chair:
    """Decides for ``size`` ranks; the watcher that it sits in has one of them."""

    def __init__(self, watcher: Watcher, *, size: int, secret: str, met: bool = True) -> None:
        self._watcher = watcher
        self._size = size
        self._secret = secret
        self._met = met
        self._peers: dict[Line, int] = {}
        self._reports: dict[int, Report] = {}
        self._heard: dict[int, float] = {}
        self._cause: Cause | None = None
        self._verdict: Verdict | None = None
        self._rounds = 0
        self._awaited: set[int] = set()
        self._shown: dict[int, str] = {}
        self._beats: dict[int, int] = {}
        self._was_stopped = False
        self._dump_until = 0.0
        self._next_ping = 0.0
        self._slow_since: tuple[float, dict[int, Signs]] = (time.monotonic(), {})
        self._slow_told: dict[str, float] = {}
        self._leave_at = float("inf")

    def on_peer(self, line: Line, message: Message) -> bool:
        """Take in what another watcher says; False for one that is no part of the run."""
        kind = message["kind"]
        if line not in self._peers:
            given = str(message.get("secret", ""))
            if kind != "hello" or not hmac.compare_digest(given.encode(), self._secret.encode()):
                return False
            self._peers[line] = message["rank"]
        rank = self._peers[line]
        self._heard[rank] = time.monotonic()
        if kind in ("report", "bye"):
            self._reports[rank] = Report.of_record(message["report"])
        elif kind == "failed":
            self.on_failed(Cause(**message["cause"]))
        elif kind == "dumped":
            self._reports[rank] = Report.of_record(message["report"])
            self._shown[rank] = message["shown"]
            self._awaited.discard(rank)
        return True

    def on_peer_gone(self, line: Line) -> None:
        """A connection has ended."""
        rank = self._peers.pop(line, None)
        if rank is None:
            return
        report = self._reports.get(rank)
        self._awaited.discard(rank)
        if report is not None and not report.ended:
            self.on_failed(Cause(rank, f"the watcher of {report.name} is gone", report.signs.step))

    def on_failed(self, cause: Cause) -> None:
        """A rank has failed: the first one is why the run ends."""
        if self._cause is not None:
            return
        if self._size > 1:
            # Nobody needs to be told of the end of a run of one process but who waits for it.
            self._watcher.write(State.failed, cause)
        if cause.rank != self._watcher.orders.rank:
            trace = f"\n{cause.trace.rstrip()}" if cause.trace else ""
            self._watcher.say(f"{cause.message}{trace}")
        self._end(cause, grace=GRACE_SECONDS)

    def _end(self, cause: Cause, *, grace: float) -> None:
        self._cause = cause
        self._leave_at = time.monotonic() + OWN_GRACE_SECONDS + 4.0
        for line, rank in self._peers.items():
            own = OWN_GRACE_SECONDS if rank == cause.rank and grace else grace
            line.send("end", cause=vars(cause), grace=own)
        mine = cause.rank == self._watcher.orders.rank and grace
        self._watcher.end_rank(cause, grace=OWN_GRACE_SECONDS if mine else grace)

    def on_own_end(self) -> None:
        """The rank of this watcher is over; others may go on for a while."""
        if self._size == 1:
            self._watcher.finish()

    def on_time(self, now: float, *, forgiven: float) -> None:
        """Look at all ranks; a few times a second."""
        own = self._watcher.report()
        self._reports[own.rank], self._heard[own.rank] = own, now
        if now > self._next_ping:
            self._next_ping = now + PING_SECONDS
            for line in self._peers:
                line.send("ping")
        if self._is_over(now):
            self._watcher.finish()
        elif self._verdict is not None and self._cause is None:
            if not self._awaited or now > self._dump_until:
                self._decide(self._verdict)
        elif self._cause is None and len(self._reports) == self._size:
            self._look(now, forgiven)

    def _is_over(self, now: float) -> bool:
        """Whether all have ended, or have had the time for it."""
        if now > self._leave_at:
            return True
        if not self._watcher.ended:
            return False
        return all(r.ended for r in self._reports.values()) or not self._peers

    def _look(self, now: float, forgiven: float) -> None:
        reports = [self._aged(report, now, forgiven) for report in self._reports.values()]
        if lost := self._find_silent(now, forgiven):
            self.on_failed(lost)
            return
        verdict = judge(sorted(reports, key=lambda r: r.rank), self._watcher.orders.limits)
        self._rounds = 0 if verdict is None else self._rounds + 1
        if verdict is not None and self._rounds >= ROUNDS:
            self._call_for_stacks(verdict, now)
        elif verdict is None:
            self._look_for_slow(now, reports)

    def _aged(self, report: Report, now: float, forgiven: float) -> Report:
        """A report as of now, at most as old as what was forgiven."""
        since = now - self._heard[report.rank]
        limit = now - forgiven
        age = min(report.signs.age + since, limit)
        tick = min(report.signs.tick_age + since, limit)
        return replace(report, signs=replace(report.signs, age=age, tick_age=tick))

    def _find_silent(self, now: float, forgiven: float) -> Cause | None:
        silent = self._watcher.orders.silent
        for rank, report in self._reports.items():
            quiet = now - max(self._heard[rank], forgiven)
            if silent and not report.ended and quiet > silent:
                message = f"nothing was heard from the machine of {report.name} for {quiet:.0f} s"
                return Cause(rank, f"{message} (watch.silent)", report.signs.step)
        return None

    def _call_for_stacks(self, verdict: Verdict, now: float) -> None:
        self._verdict, self._dump_until = verdict, now + DUMP_SECONDS
        self._beats = {rank: report.signs.beats for rank, report in self._reports.items()}
        self._was_stopped = any(r.state in ("T", "t") for r in self._reports.values())
        self._awaited = {rank for rank in self._peers.values() if not self._reports[rank].ended}
        for line, rank in self._peers.items():
            if rank in self._awaited:
                line.send("dump", heading=verdict.message)
        if not self._watcher.ended:
            own = self._watcher.orders.rank
            self._shown[own] = self._watcher.dump(verdict.message)

    def _decide(self, verdict: Verdict) -> None:
        """Execute, unless the signal that asked for the stacks has set a rank going again."""
        going = [
            report.name
            for rank, report in self._reports.items()
            if report.signs.beats > self._beats[rank]
        ]
        # One that was stopped has been let go on for that moment, and the others with it.
        if not going or self._was_stopped:
            self._execute(verdict)
            return
        self._verdict, self._rounds = None, 0
        said = f"{going[0]} goes on, now that its stacks were taken"
        self._watcher.say(f"{verdict.message}. But {said}: it was silent for long")

    def _execute(self, verdict: Verdict) -> None:
        at = [f"rank {r} at {self._shown[r]}" for r in verdict.guilty if self._shown.get(r)]
        where = f". {'; '.join(at)}" if at else ""
        if not self._met:
            where += ". The ranks of the run had not met yet"
        folder = f"{self._watcher.orders.run_dir}/logs"
        message = f"{verdict.message}{where}. Stacks: {folder}/stacks-rank-*.txt"
        rank = verdict.guilty[0] if verdict.guilty else -1
        cause = Cause(rank, message, verdict.step, verdict.section)
        self._watcher.write(State.hung, cause)
        self._watcher.say(message)
        self._end(cause, grace=0.0)

    def _look_for_slow(self, now: float, reports: list[Report]) -> None:
        factor = self._watcher.orders.slow_factor
        start, before = self._slow_since
        signs = {report.rank: report.signs for report in reports}
        if not factor or self._size == 1 or any(report.ended for report in reports):
            return
        if len(before) < self._size:
            self._slow_since = (now, signs)
            return
        steps = min(s.timed_steps - before[rank].timed_steps for rank, s in signs.items())
        if steps < SLOW_STEPS or now - start < SLOW_SECONDS:
            return
        self._slow_since = (now, signs)
        for line in find_slow(reports, before, factor):
            who = line.partition(" is slow")[0]
            if now > self._slow_told.get(who, 0.0):
                self._slow_told[who] = now + SLOW_AGAIN_SECONDS
                self._watcher.say(line)
