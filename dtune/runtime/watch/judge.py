"""Whether a run hangs, and which rank is to blame: a pure function of what ranks last said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dtune.runtime.watch.heartbeat import Place, Section, Signs

# A thread of a rank ticks twice a second, unless the process is stopped or Python is locked.
STALE_TICK_SECONDS = 5.0
# What a rank that waits for others to come has beyond its time-out: those speak first.
OTHERS_SECONDS = 5.0
_STATES = {
    "T": "it is stopped by a signal",
    "t": "it is stopped by a debugger",
    "D": "it waits in the kernel for a disk or a device",
    "Z": "it is dead",
    "X": "it is dead",
}


@dataclass(frozen=True)
class Limits:
    """Time-outs in seconds, by section; 0: never."""

    start: float
    first_step: float
    step: float
    save: float
    evaluation: float
    step_factor: float

    def of(self, signs: Signs) -> float:
        """What holds for a rank now."""
        given = float(vars(self)[signs.section.name])
        if signs.section is Section.step and given:
            given = max(given, self.step_factor * signs.longest_gap)
        if signs.place is Place.others and given:
            given += OTHERS_SECONDS
        return given or float("inf")


@dataclass(frozen=True)
class Report:
    """One rank, as its watcher sees it."""

    rank: int
    host: str
    pid: int
    signs: Signs
    state: str
    """One letter, as the kernel says it; empty where it says nothing."""
    ended: bool = False
    """Whether it has left the run in good order."""

    def record(self) -> dict[str, Any]:
        """As JSON carries it."""
        return asdict(self)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Report:
        """From JSON."""
        signs = dict(record["signs"])
        signs["section"], signs["place"] = Section(signs["section"]), Place(signs["place"])
        return cls(**{**record, "signs": Signs(**signs)})

    @property
    def name(self) -> str:
        """For people."""
        return f"rank {self.rank} ({self.host}, process {self.pid})"


@dataclass(frozen=True)
class Verdict:
    """A run that hangs."""

    guilty: tuple[int, ...]
    """Ranks that others wait for; empty where all wait alike."""
    section: str
    step: int
    message: str


def judge(reports: Sequence[Report], limits: Limits) -> Verdict | None:
    """The verdict on a run; None while there is nothing to say.

    A rank that is overdue may wait for one that still works. So a run hangs where one rank is past
    its time-out and no other has given a sign of life for as long.
    """
    there = [report for report in reports if not report.ended]
    if not there:
        return None
    quiet = min(report.signs.age for report in there)
    overdue = [r for r in there if quiet > limits.of(r.signs)]
    if not overdue:
        return None
    # The shortest of the time-outs that have passed.
    limit, late = min(((limits.of(r.signs), r) for r in overdue), key=lambda pair: pair[0])
    blamed, why = find_guilty(reports)
    names = [report.rank for report in blamed]
    section = (blamed[0] if blamed else late).signs.section
    said = [_describe(report, why) for report in blamed]
    waiting = [report for report in there if report.rank not in names]
    if waiting:
        others = "; ".join(f"rank {r.rank} in {r.signs.where}" for r in waiting[:8])
        more = f" and {len(waiting) - 8} more" if len(waiting) > 8 else ""
        said.append(f"{'waiting' if blamed else 'all alike'}: {others}{more}")
    if not blamed:
        said.insert(0, why)
    given = f"watch.{late.signs.section.name}"
    head = f"hung: no sign of life for {quiet:.0f} s, time-out {limit:.0f} s ({given}). "
    step = (blamed[0] if blamed else late).signs.step
    return Verdict(tuple(names), section.shown, step, head + ". ".join(said))


def _describe(report: Report, why: str) -> str:
    where = "after its end" if report.ended else f"in {report.signs.where}"
    silent = "" if report.ended else f", silent for {report.signs.age:.0f} s"
    return f"{report.name} hangs {where}{silent}: {_ailment(report) or why}"


def _ailment(report: Report) -> str:
    """What is wrong with the process itself."""
    if report.ended:
        return "it has left the run, and others have not"
    if report.state in _STATES:
        return _STATES[report.state]
    if report.signs.tick_age > STALE_TICK_SECONDS:
        return f"Python has not run in it for {report.signs.tick_age:.0f} s: its lock is held"
    return ""


def find_guilty(reports: Sequence[Report]) -> tuple[list[Report], str]:
    """Ranks that the others wait for, and why they are taken for it.

    In this order: ranks whose process is not well; ranks that are behind by a step; ranks that
    have not begun a collective call that others have; ranks that are behind within the step.
    """
    if ailing := [report for report in reports if _ailment(report)]:
        return ailing, ""
    if len(reports) == 1 and reports[0].signs.place is Place.others:
        return [], "a rank of the run has not come"
    if len(reports) == 1:
        return list(reports), "it is the only rank"
    first = min(report.signs.step for report in reports)
    last = max(report.signs.step for report in reports)
    if first < last:
        behind = [report for report in reports if report.signs.step == first]
        return behind, f"others are in step {last} already"
    if missing := _missing_calls(reports):
        return missing, "it has not begun a collective call that others wait in"
    places = {report.rank: (report.signs.micro, report.signs.place) for report in reports}
    lowest = min(places.values())
    if lowest < max(places.values()):
        return [r for r in reports if places[r.rank] == lowest], "others are further in the step"
    return [], "all ranks wait at the same place, as for a network, a disk or a device"


def _missing_calls(reports: Sequence[Report]) -> list[Report]:
    """Ranks that are behind in a group of processes, and ahead in none."""
    behind: set[int] = set()
    ahead: set[int] = set()
    for group in {name for report in reports for name in report.signs.calls}:
        calls = {r.rank: r.signs.calls[group] for r in reports if group in r.signs.calls}
        fewest, most = min(calls.values()), max(calls.values())
        if fewest < most:
            behind.update(rank for rank, number in calls.items() if number == fewest)
            ahead.update(rank for rank, number in calls.items() if number == most)
    return [r for r in reports if r.rank in (behind - ahead or behind)]


def find_slow(reports: Sequence[Report], before: Mapping[int, Signs], factor: float) -> list[str]:
    """A line for each rank that takes ``factor`` times as long as the middle one on its own.

    Counted from the steps since ``before``. Nothing where what it costs is no tenth of the step.
    """
    own: dict[int, float] = {}
    whole = 0.0
    for report in reports:
        since, signs = before[report.rank], report.signs
        steps = signs.timed_steps - since.timed_steps
        if steps <= 0:
            return []
        own[report.rank] = (signs.own_seconds - since.own_seconds) / steps
        whole = max(whole, (signs.step_seconds - since.step_seconds) / steps)
    ordered = sorted(own.values())
    # The lower one of two: the faster of two ranks is what the other one could be.
    middle = ordered[(len(ordered) - 1) // 2]
    return [
        f"{report.name} is slow: {own[report.rank]:.3f} s of a step of {whole:.3f} s before it "
        f"meets the others, {own[report.rank] / max(middle, 1e-9):.1f} times as long as the "
        f"middle rank ({middle:.3f} s)"
        for report in reports
        if own[report.rank] > factor * middle and own[report.rank] - middle > 0.1 * whole
    ]
