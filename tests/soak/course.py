"""One run of the soak: started by the same command until it is done, whatever happens to it."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.injection import (
    exported,
    kill_run,
    leftovers,
    numbers,
    start_train,
    state_digest,
)
from tests.soak.chaos import (
    KINDS,
    NEEDS_STEPS,
    WATCH,
    Scene,
    marked,
    wait_for_step,
    whole_steps,
)
from tests.soak.leaks import OpenFiles, count_open

RESTARTS = 100_000
ORPHAN_SECONDS = 10.0
"""Until all processes of a run that has ended must be gone."""
GOES_ON = re.compile(rb"going on from \S*step-(\d+)")
_STEP = re.compile(rb"^step +\d+/", re.MULTILINE)


@dataclass(frozen=True)
class Course:
    """What is trained."""

    name: str
    steps: int
    overrides: tuple[str, ...]

    def settings(self, run_dir: Path) -> list[str]:
        """The command: the same for every start of the run."""
        return [
            f"run_dir={run_dir}",
            "resume=auto",
            f"launch.max_restarts={RESTARTS}",
            f"train.max_steps={self.steps}",
            "train.micro_batch_size=1",
            "train.global_batch_size=4",
            "checkpoint.every=5",
            "data.max_length=64",
            "data.max_rows=64",
            "data.eval_path=none",
            "evaluate.generate=false",
            "evaluate.before=false",
            "optim.lr=3e-3",
            "log.progress=lines",
            *WATCH,
            *self.overrides,
        ]


@dataclass(frozen=True)
class Due:
    """A fault that is to come."""

    seconds: float
    """From the one before, or from a start of the run."""
    kind: str
    after_step: float | None = None
    """Seconds from the next step on, which is waited for; None: wherever the run is by then."""


@dataclass(frozen=True)
class Whole:
    """The run that was left alone."""

    digest: str
    exported: str
    rows: list[dict[str, Any]]
    seconds: float


@dataclass
class Endured:
    """What happened to a run, and what is wrong with it in the end."""

    course: str
    faults: list[dict[str, Any]] = field(default_factory=list)
    launches: int = 0
    attempts: int = 0
    """Times that ranks went on from a checkpoint."""
    seconds: float = 0.0
    checkpoints_lost: int = 0
    problems: list[str] = field(default_factory=list)
    descriptors: dict[str, list[int]] = field(default_factory=dict)
    """Least and most open files of the agent and of each rank while they step."""


def run_whole(course: Course, folder: Path, limit: float) -> Whole:
    """Run the course without any fault."""
    run_dir, log = folder / "whole", folder / "whole.log"
    started, read, files = time.monotonic(), 0, OpenFiles()
    process = start_train(course.settings(run_dir), log)
    try:
        while process.poll() is None:
            said = log.read_bytes()
            if _STEP.search(said, read):
                files.note(count_open(run_dir))
                read = said.rfind(b"\n") + 1
            assert time.monotonic() - started < limit, log.read_text()
            time.sleep(0.05)
    finally:
        kill_run(run_dir)
    assert process.returncode == 0, log.read_text()
    assert files.leaks() == []
    rows = numbers(run_dir)
    seconds = time.monotonic() - started
    return Whole(state_digest(run_dir), exported(run_dir), rows, seconds)


class Endurance:
    """Drives one run to its end through faults."""

    def __init__(
        self, course: Course, folder: Path, *, whole: Whole, seed: int, room: Path | None
    ) -> None:
        self.course, self.whole, self.room = course, whole, room
        self.run_dir = (room or folder) / folder.name
        self.log = folder / "said.log"
        self.chance = random.Random(seed)
        self.mark = f"DTUNE_SOAK={folder.name}-{seed}"
        self.result = Endured(course.name)
        self._floor = -1
        self._read = 0
        self._open_fault: dict[str, Any] | None = None
        self._allowed: set[int] = set()
        self._went_on = False
        self._files = OpenFiles()

    def run(self, faults: Iterator[Due], limit: float) -> Endured:
        """Go through ``faults``, one after another, for ``limit`` seconds at most."""
        started = time.monotonic()
        try:
            while True:
                code = self._live(faults, started + limit)
                self._check_code(code)
                if code == 0 or self.result.problems:
                    break
        finally:
            kill_run(self.run_dir)
        self.result.seconds = time.monotonic() - started
        self.result.descriptors = self._files.span()
        if not self.result.problems:
            self._check_end()
        return self.result

    def _live(self, faults: Iterator[Due], deadline: float) -> int:
        """One launch, to its end; its exit code."""
        name, _, value = self.mark.partition("=")
        process = start_train(self.course.settings(self.run_dir), self.log, {name: value})
        self.result.launches += 1
        self._allowed = set()
        scene = Scene(self.run_dir, process, self.chance, self.room)
        at, due = _next(faults)
        while process.poll() is None:
            now = time.monotonic()
            if now > deadline:
                self.result.problems.append("not done within its limit")
                return -1
            self._look()
            if now >= at:
                self._strike(due, scene)
                at, due = _next(faults)
            time.sleep(0.05)
        # What was due in this life comes in the next one, counted from its start.
        self._look()
        return process.returncode

    def _strike(self, due: Due, scene: Scene) -> None:
        kind = due.kind
        if not self._is_there(due, scene):
            return
        self._look()
        steps = whole_steps(self.run_dir)
        self._floor = max(self._floor, steps[-1] if steps else -1)
        fact = {"kind": kind, "seconds": None, "step": self._floor, "time": time.time()}
        self.result.faults.append(fact)
        self._open_fault, self._went_on = fact, False
        said = self.log.stat().st_size
        scene.hung = None
        self._allowed |= KINDS[kind](scene)
        if scene.hung is not None:
            fact["ended"] = time.time() - fact["time"]
            self._check_named(scene.hung, self.log.read_bytes()[said:])
        if kind == "a flipped bit in the newest checkpoint":
            steps = whole_steps(self.run_dir)
            self._floor = steps[-1] if steps else -1

    def _is_there(self, due: Due, scene: Scene) -> bool:
        """Wait until the run is where a fault is to meet it; False where it ends before."""
        if due.after_step is None and due.kind not in NEEDS_STEPS:
            return True
        if not wait_for_step(scene):
            return False
        end = time.monotonic() + (due.after_step or 0.0)
        while time.monotonic() < end and scene.process.poll() is None:
            self._look()
            time.sleep(0.02)
        return scene.process.poll() is None

    def _look(self) -> None:
        """Read what the run has said since: where it went on from, and whether it steps again."""
        if not self.log.is_file():
            return
        with self.log.open("rb") as file:
            file.seek(self._read)
            said = file.read()
        said = said[: said.rfind(b"\n") + 1]
        self._read += len(said)
        position = 0
        for match in GOES_ON.finditer(said):
            self.result.attempts += 1
            self._went_on, position = True, match.end()
            if int(match[1]) < self._floor:
                self.result.checkpoints_lost += 1
                self.result.problems.append(
                    f"went on from step {int(match[1])}, and {self._floor} was whole"
                )
        if self._went_on and _STEP.search(said, position):
            if self._open_fault is not None and self._open_fault["seconds"] is None:
                self._open_fault["seconds"] = time.time() - self._open_fault["time"]
            self._open_fault = None
            self._files.note(count_open(self.run_dir))

    def _check_named(self, rank: int, said: bytes) -> None:
        """Whether a rank that was stopped for good is the one that is blamed."""
        if not re.search(rb"hung: .*\brank %d\b[^;]* hangs .*stopped by a signal" % rank, said):
            self.result.problems.append(f"rank {rank} hung and was not named")

    def _check_code(self, code: int) -> None:
        if code != 0 and code not in self._allowed:
            end = self.log.read_text(errors="replace")[-3000:]
            self.result.problems.append(f"ended with {code}: {end}")

    def _check_end(self) -> None:
        """Whether it is the run that was left alone, and nothing else is left of it."""
        problems = self.result.problems
        problems += self._files.leaks()
        deadline = time.monotonic() + ORPHAN_SECONDS
        while (orphans := marked(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        if orphans:
            problems.append(f"processes left: {orphans}")
        if temporary := leftovers(self.run_dir):
            problems.append(f"left: {temporary}")
        if state_digest(self.run_dir) != self.whole.digest:
            problems.append("the state is not that of the run that was left alone")
        if exported(self.run_dir) != self.whole.exported:
            problems.append("the weights are not those of the run that was left alone")
        if numbers(self.run_dir) != self.whole.rows:
            problems.append("the metrics are not those of the run that was left alone")


def _next(faults: Iterator[Due]) -> tuple[float, Due]:
    due = next(faults, Due(float("inf"), ""))
    return time.monotonic() + due.seconds, due
