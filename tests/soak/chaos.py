"""What the soak does to a run: one function a kind of fault, all from outside the run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dtune.checkpoint.layout import list_steps, step_name
from dtune.checkpoint.manifest import find_damage, read_manifest
from dtune.checkpoint.reader import CHECKPOINTS
from dtune.errors import CheckpointError
from tests.faults.injection import kill, kill_run, workers_of

KILLED = -int(signal.SIGKILL)
STOPPED = 75
BALLAST = "ballast"
_FULL_SECONDS = 20.0
WATCH = (
    "watch.on_hang=restart",
    "watch.start=180",
    "watch.first_step=60",
    "watch.step=20",
    "watch.step_factor=0",
    "watch.save=60",
    "watch.evaluation=60",
)
"""Settings by which a rank that hangs is found soon; longer than any pause of a busy machine."""
_STEP_WAIT = 120.0
# The longest time-out after a first step, and ten seconds to end all ranks.
_HUNG_SECONDS = 60.0 + 10.0


@dataclass
class Scene:
    """A run that is going on, and where."""

    run_dir: Path
    process: subprocess.Popen[bytes]
    """The launching process."""
    chance: random.Random
    room: Path | None
    """A small file system that holds run_dir, to be filled; None: there is none."""
    hung: int | None = None
    """Rank that was stopped for good."""


def whole_steps(run_dir: Path) -> list[int]:
    """Published checkpoints whose files all have the hashes of their manifests."""
    found = []
    for step in list_steps(run_dir / CHECKPOINTS):
        path = run_dir / CHECKPOINTS / step_name(step)
        # Retention may be deleting an old one.
        with contextlib.suppress(CheckpointError, OSError):
            if not find_damage(path, read_manifest(path)):
                found.append(step)
    return found


def kill_rank(scene: Scene) -> set[int]:
    """kill -9 of one rank."""
    return _to_a_rank(scene, signal.SIGKILL)


def abort_rank(scene: Scene) -> set[int]:
    """SIGABRT to one rank, which dies of it."""
    return _to_a_rank(scene, signal.SIGABRT)


def crash_rank(scene: Scene) -> set[int]:
    """SIGSEGV to one rank, which dies of it."""
    return _to_a_rank(scene, signal.SIGSEGV)


def _workers(scene: Scene) -> dict[int, int]:
    """Process of each rank, waited for while the run starts; none where it ends instead."""
    while not (workers := workers_of(scene.run_dir)) and scene.process.poll() is None:
        time.sleep(0.02)
    return workers


def _to_a_rank(scene: Scene, number: signal.Signals) -> set[int]:
    workers = _workers(scene)
    if workers:
        kill(workers[scene.chance.choice(sorted(workers))], number)
    return set()


def kill_tree(scene: Scene) -> set[int]:
    """kill -9 of launcher, agent and all ranks."""
    kill_run(scene.run_dir)
    return {KILLED}


def preempt_usr1(scene: Scene) -> set[int]:
    """SIGUSR1 to the launcher, as a batch system warns a job."""
    kill(scene.process.pid, signal.SIGUSR1)
    return {STOPPED, -int(signal.SIGUSR1)}


def preempt_term(scene: Scene) -> set[int]:
    """SIGTERM to the launcher, as a batch system ends a job."""
    kill(scene.process.pid, signal.SIGTERM)
    return {STOPPED, -int(signal.SIGTERM), 128 + int(signal.SIGTERM)}


def pause_rank(scene: Scene) -> set[int]:
    """SIGSTOP one rank for a few seconds: slow, not dead."""
    workers = _workers(scene)
    if workers:
        pid = workers[scene.chance.choice(sorted(workers))]
        kill(pid, signal.SIGSTOP)
        time.sleep(scene.chance.uniform(1, 5))
        kill(pid, signal.SIGCONT)
    return set()


def hang_rank(scene: Scene) -> set[int]:
    """SIGSTOP one rank for good; the watchers end it."""
    workers = workers_of(scene.run_dir)
    if not workers:
        return set()
    scene.hung = scene.chance.choice(sorted(workers))
    pid = workers[scene.hung]
    kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + _HUNG_SECONDS
    while Path(f"/proc/{pid}").exists():
        if time.monotonic() > deadline:
            # By nobody else, so that its exit code is one that was not allowed.
            kill_run(scene.run_dir)
        time.sleep(0.05)
    return set()


def wait_for_step(scene: Scene) -> bool:
    """Wait until the run has written one more row; whether it has."""
    rows = scene.run_dir / "metrics.jsonl"
    before = rows.stat().st_size if rows.is_file() else 0
    deadline = time.monotonic() + _STEP_WAIT
    while scene.process.poll() is None and time.monotonic() < deadline:
        if rows.is_file() and rows.stat().st_size > before:
            return True
        time.sleep(0.02)
    return False


def flip_bit(scene: Scene) -> set[int]:
    """Kill the tree and flip one bit of the newest checkpoint, where an older one is whole."""
    kill_run(scene.run_dir)
    steps = whole_steps(scene.run_dir)
    if len(steps) > 1:
        folder = scene.run_dir / CHECKPOINTS / step_name(steps[-1])
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        weights = [path.stat().st_size for path in files]
        (file,) = scene.chance.choices(files, weights)
        data = bytearray(file.read_bytes())
        place = scene.chance.randrange(8 * len(data))
        data[place // 8] ^= 1 << place % 8
        file.write_bytes(data)
    return {KILLED}


def tear_metrics(scene: Scene) -> set[int]:
    """Kill the tree and leave half a line at the end of metrics.jsonl."""
    kill_run(scene.run_dir)
    path = scene.run_dir / "metrics.jsonl"
    if path.is_file():
        with path.open("ab") as file:
            file.write(b'{"kind": "train", "step": 1')
    return {KILLED}


def fill_disk(scene: Scene) -> set[int]:
    """Leave no byte on the run's file system until the run has ended, or for some seconds."""
    assert scene.room is not None
    ballast = scene.room / BALLAST
    try:
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        deadline = time.monotonic() + _FULL_SECONDS
        while scene.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        ballast.unlink(missing_ok=True)
    # A disk that takes no checkpoint is told as a wrong setting: freed, the same command goes on.
    return {1, 2}


KINDS: dict[str, Callable[[Scene], set[int]]] = {
    "kill -9 of a rank": kill_rank,
    "kill -9 of the tree": kill_tree,
    "SIGABRT to a rank": abort_rank,
    "SIGSEGV to a rank": crash_rank,
    "SIGUSR1 to the launcher": preempt_usr1,
    "SIGTERM to the launcher": preempt_term,
    "a rank stopped for seconds": pause_rank,
    "a rank stopped for good": hang_rank,
    "a flipped bit in the newest checkpoint": flip_bit,
    "half a line of metrics": tear_metrics,
    "a full disk": fill_disk,
}
"""What each fault does; the exit codes that the launcher may end with because of it."""
NEEDS_ROOM = frozenset({"a full disk"})
NEEDS_STEPS = frozenset({"a rank stopped for good"})
"""Faults of a run that steps: while ranks start, nobody watches all of them yet."""


def marked(variable: str) -> list[int]:
    """Other processes that have a variable in their environment, whatever they are."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable.encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append(int(path.name))
    return [pid for pid in found if pid != os.getpid()]
