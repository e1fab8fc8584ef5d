"""``make soak``: random faults for so many minutes, and a report.

python -m tests.soak.run [minutes=20] [seed=1] [kills=25] [restarts=20] [mean=8] [slurm=1]
    [out=FILE.json] [page=FILE.md]

Ways in which workers fail, then kills at random times, then every kind of fault on several engines
with ``mean`` seconds between them, then jobs of a SLURM on this host.
"""

from __future__ import annotations

import contextlib
import operator
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.injection import KINDS as ENDS
from tests.faults.injection import Fault, fired, kill_run, plan_faults, start_train, state_digest
from tests.soak.chaos import KINDS, NEEDS_ROOM
from tests.soak.course import GOES_ON, Course, Due, Endurance, Endured, Whole, run_whole
from tests.soak.report import write_report
from tests.soak.slurm_leg import endure_slurm, why_not

COURSES = (
    Course("lora, ddp, 2 ranks", 120, ("peft.dropout=0.1", "parallel=ddp", "launch.nproc=2")),
    Course("full, fsdp, 4 ranks", 80, ("peft=full", "parallel=fsdp", "launch.nproc=4")),
    Course("lora, zero2, 2 ranks", 80, ("peft.dropout=0.1", "parallel=zero2", "launch.nproc=2")),
    Course("lora, ddp, 4 ranks", 80, ("peft.dropout=0.1", "parallel=ddp", "launch.nproc=4")),
)
WAYS = (*ENDS, "nan")
"""How a worker fails by itself: it ends, or its numbers go bad."""
ROOM_MIB = 512
LIMIT = 3600.0
"""Seconds for one run; a run that hangs is a failure of the soak."""


@dataclass
class Options:
    """Of the command line."""

    minutes: float = 20
    seed: int = 1
    kills: int = 25
    restarts: int = 20
    mean: float = 8
    """Mean time to failure in seconds."""
    slurm: int = 1
    """0: no jobs of SLURM."""
    out: str = "benchmarks/results/soak.json"
    page: str = "docs/soak.md"


@dataclass
class Soak:
    """All that has been done."""

    options: Options
    folder: Path
    room: Path | None
    legs: list[Endured] = field(default_factory=list)
    wholes: dict[str, Whole] = field(default_factory=dict)
    clean_restarts: list[bool] = field(default_factory=list)
    kills: int = 0
    """That have happened, of those asked for."""

    def whole(self, course: Course) -> Whole:
        """The course without faults, run once."""
        if course.name not in self.wholes:
            folder = self.folder / f"whole-{len(self.wholes)}"
            folder.mkdir()
            self.wholes[course.name] = run_whole(course, folder, LIMIT)
            say(f"{course.name}: {self.wholes[course.name].seconds:.0f} s when left alone")
        return self.wholes[course.name]

    def endure(self, course: Course, faults: Iterator[Due]) -> Endured:
        """One run of a course through faults."""
        number = len(self.legs)
        folder = self.folder / f"leg-{number}"
        folder.mkdir()
        whole = self.whole(course)
        seed = self.options.seed * 1000 + number
        result = Endurance(course, folder, whole=whole, seed=seed, room=self.room).run(
            faults, LIMIT
        )
        self.legs.append(result)
        say(
            f"{course.name}: {len(result.faults)} faults, {result.attempts} times gone on, "
            f"{result.seconds:.0f} s, {'; '.join(result.problems) or 'equal'}"
        )
        if self.room is not None and not result.problems:
            shutil.rmtree(self.room / folder.name)
        return result


def main(argv: list[str]) -> int:
    """Soak, report; 0 where nothing was lost."""
    options = parse(argv)
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="dtune-soak-") as name, small_room() as room:
        soak = Soak(options, Path(name), room)
        loads = [os.getloadavg()[0]]
        deadline = time.monotonic() + 60 * options.minutes
        restart_cleanly(soak)
        kill_at_random(soak)
        mix(soak, deadline)
        batch(soak)
        loads.append(os.getloadavg()[0])
        ok = write_report(soak, started=started, loads=loads)
        if not ok:
            kept = shutil.copytree(name, tempfile.mkdtemp(prefix="dtune-soak-kept-") + "/soak")
            say(f"what is left of it: {kept}")
    return 0 if ok else 1


def parse(argv: list[str]) -> Options:
    """``key=value`` settings."""
    options = Options()
    for argument in argv:
        name, _, value = argument.partition("=")
        if name not in vars(options) or not value:
            raise SystemExit(f"{argument}: one of {', '.join(f'{key}=' for key in vars(options))}")
        kind = type(vars(options)[name])
        setattr(options, name, kind(value))
    return options


def say(line: str) -> None:
    """To the terminal, at once."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {line}\n")
    sys.stdout.flush()


@contextlib.contextmanager
def small_room() -> Iterator[Path | None]:
    """A file system that can be filled; None where this user may not mount one."""
    place = Path(tempfile.mkdtemp(prefix="dtune-soak-room-"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM_MIB}m", "dtune-soak", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        say("no full disks: mounting a tmpfs takes root")
        place.rmdir()
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
        place.rmdir()


def restart_cleanly(soak: Soak) -> None:
    """Workers that fail in each way, again and again: one attempt more for each."""
    if not soak.options.restarts:
        return
    course, chance = COURSES[0], random.Random(soak.options.seed)
    whole = soak.whole(course)
    folder = soak.folder / "restarts"
    folder.mkdir()
    ways = [WAYS[number % len(WAYS)] for number in range(soak.options.restarts)]
    chance.shuffle(ways)
    plan = [Fault(way, chance.randrange(2), after=chance.randint(6, 7)) for way in ways]
    env = plan_faults(folder / "plan", plan)
    run_dir = folder / "run"
    started = time.monotonic()
    process = start_train(course.settings(run_dir), folder / "said.log", env)
    try:
        code = process.wait(LIMIT)
    finally:
        kill_run(run_dir)
    happened = fired(folder / "plan")
    soak.clean_restarts = [fact["attempt"] == number for number, fact in enumerate(happened)]
    went_on = steps_gone_on_from((folder / "said.log").read_bytes())
    result = Endured(course.name, launches=1, attempts=len(happened))
    published = [fact["published"] for fact in happened]
    result.checkpoints_lost = sum(map(operator.lt, went_on, published))
    result.seconds = time.monotonic() - started
    times = [fact["time"] for fact in happened]
    result.faults = [
        {"kind": f"a worker's {fact['kind']} in a step", "seconds": None, "step": fact["step"]}
        for fact in happened
    ]
    if code or len(happened) < len(plan) or state_digest(run_dir) != whole.digest:
        result.problems.append(f"{len(happened)} of {len(plan)} restarts, exit code {code}")
    if result.checkpoints_lost or len(went_on) != len(published):
        result.problems.append(f"went on from {went_on}, and {published} were published")
    soak.legs.append(result)
    between = (times[-1] - times[0]) / max(1, len(times) - 1) if times else 0
    say(f"{sum(soak.clean_restarts)} of {len(plan)} clean restarts, {between:.1f} s each")


def steps_gone_on_from(said: bytes) -> list[int]:
    """Checkpoint of each attempt but the first of what a run has said; -1: it started anew."""
    attempts = said.split(b"attempt ended: ")[1:]
    return [int(found[1]) if (found := GOES_ON.search(it)) else -1 for it in attempts]


def kill_at_random(soak: Soak) -> None:
    """kill -9 of a rank or the tree: while a run starts, and while it steps, saves and exports."""
    chance, asked = random.Random(soak.options.seed + 1), soak.options.kills
    span = soak.whole(COURSES[0]).seconds

    def faults() -> Iterator[Due]:
        for _ in range(asked - soak.kills):
            kind = chance.choice(("kill -9 of a rank", "kill -9 of a rank", "kill -9 of the tree"))
            if chance.random() < 1 / 3:
                yield Due(chance.uniform(0, span / 2), kind)
            else:
                yield Due(0.0, kind, after_step=chance.uniform(0, span / 4))

    while soak.kills < asked:
        result = soak.endure(COURSES[0], faults())
        # What was to come after the run had ended has not happened.
        soak.kills += len(result.faults)
        if result.problems:
            return


def mix(soak: Soak, deadline: float) -> None:
    """Every kind of fault, in turn and then at random, on every course, until the time is up."""
    chance = random.Random(soak.options.seed + 2)
    kinds = [kind for kind in KINDS if soak.room is not None or kind not in NEEDS_ROOM]
    bag: list[str] = []

    def faults() -> Iterator[Due]:
        while time.monotonic() < deadline:
            if not bag:
                bag.extend(chance.sample(kinds, len(kinds)))
            seconds = min(chance.expovariate(1 / soak.options.mean), 4 * soak.options.mean)
            steps = chance.random() < 1 / 2
            yield Due(seconds / 4, bag.pop(), seconds / 4) if steps else Due(seconds, bag.pop())

    number = 0
    while time.monotonic() < deadline:
        if soak.endure(COURSES[number % len(COURSES)], faults()).problems:
            return
        number += 1


def batch(soak: Soak) -> None:
    """The faults of a batch system."""
    if not soak.options.slurm:
        return
    if reason := why_not():
        say(f"no SLURM: {reason}")
        return
    for result in endure_slurm(soak.folder / "slurm"):
        soak.legs.append(result)
        fault = result.faults[0]
        say(
            f"{fault['kind']}: gone on after {fault['seconds']:.0f} s, "
            f"{'; '.join(result.problems) or 'equal'}"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
