"""Signs of life: what a rank writes into memory that its watcher reads.

Standard library only. Every slot is one 64-bit integer, written in one store, so that a reader
never needs a lock of the writer.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum

MAX_GROUPS = 48
_SLOTS = 16
NUM_BYTES = mmap.PAGESIZE
assert 8 * (_SLOTS + 2 * MAX_GROUPS) <= NUM_BYTES


class Section(IntEnum):
    """What a rank is at; each has a time-out of its own."""

    start = 0
    first_step = 1
    step = 2
    save = 3
    evaluation = 4

    @property
    def shown(self) -> str:
        """The name as messages say it."""
        return "step" if self is Section.first_step else self.name


class Place(IntEnum):
    """Where in its section a rank was when it last gave a sign of life."""

    nowhere = 0
    batch = 1
    forward = 2
    backward = 3
    update = 4
    end = 5
    others = 6
    """Not met yet."""


_PLACES = {
    Place.nowhere: "",
    Place.batch: "waiting for its next batch",
    Place.forward: "forward pass",
    Place.backward: "backward pass",
    Place.update: "clipping and update",
    Place.end: "end of the step",
    Place.others: "waiting for the other ranks to come",
}


class _Slot:
    # No enum: it would take longer to look a slot up than to write it.
    beats = 0
    beat_ns = 1
    section = 2
    place = 3
    micro = 4
    step = 5
    timed_steps = 6
    own_ns = 7
    step_ns = 8
    tick_ns = 9
    gap_ns = 10
    groups = 11


@dataclass(frozen=True)
class Signs:
    """What a rank has last said of itself; ages in seconds."""

    beats: int
    age: float
    section: Section
    place: Place
    micro: int
    step: int
    """The optimizer step that it is in, or did last."""
    timed_steps: int
    own_seconds: float
    """Time that the timed steps took before they met the other ranks."""
    step_seconds: float
    """The same steps from end to end."""
    tick_age: float
    """Since a thread of the rank last had Python's lock."""
    longest_gap: float
    """Longest silence within the steps after the first."""
    calls: Mapping[str, int]
    """Collective calls begun, by process group."""

    @property
    def where(self) -> str:
        """For people: section, step and place."""
        if self.section is Section.start:
            return "the start" + (f", {_PLACES[self.place]}" if self.place else "")
        if self.section in (Section.save, Section.evaluation):
            return f"{self.section.shown} after step {self.step}"
        place = _PLACES[self.place]
        if self.place in (Place.forward, Place.backward):
            place += f" of micro batch {self.micro + 1}"
        return f"step {self.step}" + (f", {place}" if place else "")


class Heartbeat:
    """The shared page of one rank, for the rank and for its watcher."""

    def __init__(self, descriptor: int) -> None:
        self._map = mmap.mmap(descriptor, NUM_BYTES)
        self._view = memoryview(self._map).cast("q")

    def beat(self) -> None:
        """A sign of life."""
        view, now = self._view, time.monotonic_ns()
        if view[_Slot.section] == Section.step:
            gap = now - view[_Slot.beat_ns]
            if gap > view[_Slot.gap_ns]:
                view[_Slot.gap_ns] = gap
        view[_Slot.beat_ns] = now
        view[_Slot.beats] += 1

    def at(self, place: Place, micro: int = 0) -> None:
        """A sign of life, and where in the section it was given."""
        self.beat()
        self._view[_Slot.place] = place
        self._view[_Slot.micro] = micro

    def enter(self, section: Section) -> None:
        """Begin a section; what has been silent before is no part of it."""
        self._view[_Slot.beat_ns] = time.monotonic_ns()
        self._view[_Slot.section] = section
        self._view[_Slot.place] = Place.nowhere
        self.beat()

    def step(self, step: int) -> None:
        """The optimizer step that begins now, counted from 1."""
        self._view[_Slot.step] = step
        self.beat()

    def timed(self, own_ns: int, step_ns: int) -> None:
        """Count a step that is over: how long it took alone, and in all."""
        self._view[_Slot.own_ns] += own_ns
        self._view[_Slot.step_ns] += step_ns
        self._view[_Slot.timed_steps] += 1

    def tick(self, calls: Mapping[str, int]) -> None:
        """What a thread of its own says: Python runs, and these collective calls have begun."""
        view = self._view
        for index, (name, number) in enumerate(list(calls.items())[:MAX_GROUPS]):
            key = int.from_bytes(name.encode()[-8:].rjust(8, b" "), "little", signed=True)
            view[_SLOTS + 2 * index] = key
            view[_SLOTS + 2 * index + 1] = number
        view[_Slot.groups] = min(len(calls), MAX_GROUPS)
        view[_Slot.tick_ns] = time.monotonic_ns()

    @property
    def section(self) -> Section:
        """The section that the rank is in."""
        return Section(self._view[_Slot.section])

    @property
    def micro(self) -> int:
        """Micro batch of the step that the rank is in, counted from 0."""
        return int(self._view[_Slot.micro])

    def read(self) -> Signs:
        """What it says now."""
        view, now = self._view, time.monotonic_ns()
        calls = {}
        for index in range(min(view[_Slot.groups], MAX_GROUPS)):
            key = view[_SLOTS + 2 * index].to_bytes(8, "little", signed=True)
            calls[key.decode(errors="replace").strip()] = view[_SLOTS + 2 * index + 1]
        return Signs(
            beats=view[_Slot.beats],
            age=max(0, now - view[_Slot.beat_ns]) / 1e9,
            section=Section(view[_Slot.section]),
            place=Place(view[_Slot.place]),
            micro=view[_Slot.micro],
            step=view[_Slot.step],
            timed_steps=view[_Slot.timed_steps],
            own_seconds=view[_Slot.own_ns] / 1e9,
            step_seconds=view[_Slot.step_ns] / 1e9,
            tick_age=max(0, now - view[_Slot.tick_ns]) / 1e9,
            longest_gap=view[_Slot.gap_ns] / 1e9,
            calls=calls,
        )


class _Current:
    """The heartbeat of this process; there is at most one, as there is one log."""

    heartbeat: Heartbeat | None = None


def beat() -> None:
    """Give a sign of life, from whatever takes long; nothing happens where nobody watches."""
    if _Current.heartbeat is not None:
        _Current.heartbeat.beat()


def at(place: Place, micro: int = 0) -> None:
    """Give a sign of life from a place of the step."""
    if _Current.heartbeat is not None:
        _Current.heartbeat.at(place, micro)


def enter(section: Section) -> None:
    """Begin a section that lasts until the next."""
    if _Current.heartbeat is not None:
        _Current.heartbeat.enter(section)


@contextmanager
def section(section: Section) -> Iterator[None]:
    """A section within another one, which goes on afterwards."""
    heartbeat = _Current.heartbeat
    if heartbeat is None:
        yield
        return
    before = heartbeat.section
    heartbeat.enter(section)
    try:
        yield
    finally:
        heartbeat.enter(before)


def begin_step(step: int) -> None:
    """The optimizer step ``step`` begins."""
    if _Current.heartbeat is not None:
        _Current.heartbeat.step(step)


def end_step(own_seconds: float, step_seconds: float) -> None:
    """An optimizer step is over; the first one of a process ends the section ``first_step``."""
    heartbeat = _Current.heartbeat
    if heartbeat is None:
        return
    if heartbeat.section is Section.first_step:
        heartbeat.enter(Section.step)
    else:
        heartbeat.timed(int(own_seconds * 1e9), int(step_seconds * 1e9))
    heartbeat.at(Place.end)


def longest_gap() -> float:
    """Longest silence in seconds of this process in its steps; 0 where nobody watches."""
    return 0.0 if _Current.heartbeat is None else _Current.heartbeat.read().longest_gap


def current_micro() -> int:
    """Micro batch that this process is in, counted from 0; 0 where nobody watches."""
    return 0 if _Current.heartbeat is None else _Current.heartbeat.micro


def watch_this_process(heartbeat: Heartbeat | None) -> None:
    """Let the signs of life of this process go to ``heartbeat``; None: to nobody."""
    _Current.heartbeat = heartbeat
