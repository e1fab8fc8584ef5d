"""Trials as elements of SLURM arrays, each with its own nodes."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtune_launch.schema.slurm import SlurmConfig
from dtune_launch.slurm import render_script, submit_script
from dtune_launch.slurm_queries import WAITING, WORKING, run_client
from dtune_launch.spec import LaunchError

from dtune.errors import ConfigError
from dtune.sweep.folder import Attempt, add_attempt
from dtune.sweep.standing import QUEUED, RUNNING, UNKNOWN

_ASK_SECONDS = 20.0


@dataclass(frozen=True)
class Element:
    """A trial that is ready to be submitted."""

    number: int
    folder: Path
    launch: SlurmConfig
    nproc: int
    """Processes on each node."""


def scripts_of(
    sweep: Path, elements: Sequence[Element], parallel: int
) -> list[tuple[str, list[Element]]]:
    """The scripts of the arrays that train the trials: one for each kind of nodes asked for."""
    kinds: list[list[Element]] = []
    for element in elements:
        same = [kind for kind in kinds if _asks_alike(kind[0], element)]
        if same:
            same[0].append(element)
        else:
            kinds.append([element])
    return [(_script(sweep, kind, parallel), kind) for kind in kinds]


def _asks_alike(one: Element, other: Element) -> bool:
    return one.launch == other.launch and one.nproc == other.nproc


def _script(sweep: Path, kind: Sequence[Element], parallel: int) -> str:
    return render_script(
        kind[0].launch,
        {element.number: element.folder for element in kind},
        nproc=kind[0].nproc,
        name=kind[0].launch.job_name or sweep.name,
        logs=sweep / "logs",
        is_array=True,
        at_once=parallel if parallel < len(kind) else 0,
    )


def submit_arrays(sweep: Path, elements: Sequence[Element], parallel: int) -> list[str]:
    """Write the scripts into the folder of the sweep and submit them; the ids of the arrays.

    Raises ConfigError with SLURM's own words where it refuses one.
    """
    (sweep / "logs").mkdir(exist_ok=True)
    ids = []
    for text, kind in scripts_of(sweep, elements, parallel):
        number = len(list(sweep.glob("array-*.sbatch")))
        script = sweep / f"array-{number}.sbatch"
        script.write_text(text, encoding="utf-8")
        try:
            array = submit_script(script)
        except LaunchError as error:
            raise ConfigError(
                f"{error}\nthe trials are frozen: dtune sweep resume {sweep} submits them, with "
                "launch=... where that was wrong"
            ) from error
        for element in kind:
            add_attempt(element.folder, Attempt(job=f"{array}_{element.number}"))
        ids.append(array)
    return ids


def ask_to_stop(job: str) -> None:
    """Ask an element to save and stop, and not to be requeued."""
    run_client(["scancel", "--batch", "--signal=USR2", job], seconds=_ASK_SECONDS)


def ask_queue(jobs: Sequence[str]) -> dict[str, str]:
    """How elements ``<array>_<element>`` stand that are not over: queued, running, or unknown.

    Unknown: SLURM did not answer.
    """
    found: dict[str, str] = {}
    for array in sorted({job.partition("_")[0] for job in jobs}):
        command = ["squeue", "--noheader", "--array", "--format=%i|%T", f"--jobs={array}"]
        try:
            done = run_client(command, seconds=_ASK_SECONDS)
        except FileNotFoundError:  # Not a machine of the cluster.
            done = subprocess.CompletedProcess(command, 127, "", "no squeue")
        if not done.returncode:
            found.update(parse_queue(done.stdout))
        elif "Invalid job id" not in done.stderr:
            found.update({job: UNKNOWN for job in jobs if job.startswith(f"{array}_")})
    return found


def parse_queue(text: str) -> Mapping[str, str]:
    """Lines of ``<array>_<element>|<state>``; those that are over are left out."""
    found = {}
    for line in text.splitlines():
        job, _, state = line.strip().partition("|")
        if state in WAITING:
            found[job] = QUEUED
        elif state in WORKING:
            found[job] = RUNNING
    return found
