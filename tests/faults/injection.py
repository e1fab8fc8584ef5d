"""Runs that fail on purpose: planned faults in the workers, kills from outside, digests after."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dtune.checkpoint.layout import list_steps, step_name
from dtune.checkpoint.manifest import find_damage, read_manifest
from dtune.checkpoint.reader import CHECKPOINTS
from dtune.train.sinks.base import Row
from dtune.train.sinks.jsonl import read_metrics

INJECTED = Path(__file__).parents[1] / "injected"
KINDS = ("kill", "raise", "exit", "abort", "segfault")
"""Ways in which a worker ends."""
# What a clock or the process decides.
TIMED = {"tokens_per_second", "targets_per_second", "peak_memory_gib", "mfu"}


@dataclass(frozen=True)
class Fault:
    """A worker that fails in the middle of its run."""

    kind: str
    rank: int
    after: int
    """Steps of the attempt, counted from 1."""
    delay: float = 0.0
    """Seconds from the start of that step: another thread fails, wherever the run is then."""


def plan_faults(folder: Path, faults: Sequence[Fault]) -> dict[str, str]:
    """Write the plan to a new folder; the environment in which workers follow it."""
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps([asdict(fault) for fault in faults]))
    known = os.environ.get("PYTHONPATH")
    path = f"{INJECTED}{os.pathsep}{known}" if known else str(INJECTED)
    return {"DTUNE_TEST_FAULTS": str(folder), "PYTHONPATH": path}


def fired(folder: Path) -> list[dict[str, Any]]:
    """What has happened of a plan, in order."""
    files = sorted(folder.glob("fired-*.json"), key=lambda path: int(path.stem[6:]))
    return [json.loads(path.read_text()) for path in files]


def start_train(
    overrides: Sequence[str], log: Path, env: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """``dtune train`` in a session of its own; what it says is added to ``log``."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "dtune", "train", *overrides],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            start_new_session=True,
        )


def processes_of(run_dir: Path) -> dict[int, list[str]]:
    """Command lines by process: everything that has the run's folder among its arguments."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # It has just ended.
            arguments = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if int(path.name) != os.getpid() and any(
                argument.removeprefix("run_dir=") == str(run_dir)
                or argument.startswith(f"--log-dir={run_dir}/")
                for argument in arguments
            ):
                found[int(path.name)] = arguments
    return found


def workers_of(run_dir: Path) -> dict[int, int]:
    """Process of each rank that runs now."""
    ranks = {}
    for pid, arguments in processes_of(run_dir).items():
        if "dtune.worker" not in arguments:
            continue
        with contextlib.suppress(OSError):
            pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            ranks.update({int(pair[5:]): pid for pair in pairs if pair.startswith(b"RANK=")})
    return ranks


def family(pid: int) -> list[int]:
    """A process and all that come from it."""
    found = [pid]
    for parent in found:
        children = Path(f"/proc/{parent}/task/{parent}/children")
        try:
            found += [int(child) for child in children.read_text().split()]
        except OSError:
            continue  # It has just ended.
    return found


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> bool:
    """Send a signal; whether the process was still there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def kill_run(run_dir: Path) -> int:
    """kill -9 of launcher, agent and ranks, at once; how many there were."""
    killed = sum(kill(pid) for pid in processes_of(run_dir))
    while processes := processes_of(run_dir):  # One that was being started meanwhile.
        killed += sum(kill(pid) for pid in processes)
        time.sleep(0.01)
    return killed


@contextlib.contextmanager
def nothing_left(run_dir: Path) -> Iterator[None]:
    """Kill what the block leaves of a run when it fails."""
    try:
        yield
    finally:
        kill_run(run_dir)


def newest_step(run_dir: Path) -> int:
    """Newest published checkpoint; -1 if there is none."""
    return max(list_steps(run_dir / CHECKPOINTS), default=-1)


def state_digest(run_dir: Path) -> str:
    """Hash of all state at the newest step: weights, optimizer, schedule, generators, position.

    The manifest has the hash of every file, each of which is read and compared first.
    """
    path = run_dir / CHECKPOINTS / step_name(newest_step(run_dir))
    manifest = read_manifest(path)
    assert find_damage(path, manifest) == []
    facts = sorted((name, fact.digest) for name, fact in manifest.files.items())
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def numbers(run_dir: Path) -> list[Row]:
    """Rows of training in metrics.jsonl, in order, without what a clock decides."""
    return [
        {name: value for name, value in row.items() if name not in TIMED}
        for row in read_metrics(run_dir / "metrics.jsonl")
        if row["kind"] == "train"
    ]


def exported(run_dir: Path) -> str:
    """Hash of the weights that the run exported."""
    digest = hashlib.sha256()
    for path in sorted(run_dir.glob("adapter/*.safetensors")) + sorted(
        run_dir.glob("model/*.safetensors")
    ):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def leftovers(run_dir: Path) -> list[str]:
    """Temporary files and folders that nobody has removed."""
    return [
        str(path.relative_to(run_dir))
        for path in run_dir.rglob("*")
        if path.name.startswith((".tmp", ".status-")) or path.name.endswith(".tmp")
    ]
