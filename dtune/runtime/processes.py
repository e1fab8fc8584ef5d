"""Processes as others can find them again: on this host, on another, in a job of SLURM."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtune_launch.slurm_queries import OVER

# What torchrun calls every rendezvous that was given no name, and dtune those of one machine.
_NAMELESS = ("", "none", "ranks")


@dataclass(frozen=True)
class Holder:
    """A process, told apart from a later one with the same number."""

    host: str
    machine: str
    """Boot and process namespace: where the number means this process."""
    pid: int
    born: int
    """Clock ticks from boot to its start."""
    since: str
    """Local time, for people."""
    job: str = ""
    """SLURM job, or the name that torchrun's rendezvous was given; empty without one."""
    attempt: tuple[int, int] = (0, 0)
    """Times that SLURM has requeued the job, and that torchrun has started its ranks again."""

    def describe(self) -> str:
        """One phrase for people."""
        job = f" of job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


def this_process() -> Holder:
    """The calling process as a holder."""
    environment = os.environ
    rendezvous = environment.get("TORCHELASTIC_RUN_ID", "")
    torchrun = "" if rendezvous in _NAMELESS else f"torchrun {rendezvous}"
    return Holder(
        host=socket.gethostname(),
        machine=this_machine(),
        pid=os.getpid(),
        born=_born(os.getpid()) or 0,
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        job=environment.get("SLURM_JOB_ID", torchrun),
        attempt=(
            int(environment.get("SLURM_RESTART_COUNT", "0")),
            int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
        ),
    )


def is_same(one: Holder, other: Holder) -> bool:
    """Whether two are one process."""
    return (one.machine, one.pid, one.born) == (other.machine, other.pid, other.born)


def is_earlier_attempt(holder: Holder, own: Holder) -> bool:
    """Whether a process is of the same job, before SLURM or torchrun started it again."""
    return bool(own.job) and holder.job == own.job and holder.attempt < own.attempt


def is_alive(holder: Holder) -> bool:
    """Whether the process still runs; of one on another host that is taken for granted."""
    return holder.machine != this_machine() or _born(holder.pid) == holder.born


def job_is_over(job: str) -> bool:
    """Whether SLURM, asked here, says that a job has ended or that it knows it no more."""
    if not job.isdecimal() or shutil.which("squeue") is None:
        return False
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    if done.returncode:
        return "Invalid job id" in done.stderr
    return all(state in OVER for state in done.stdout.split())


def this_machine() -> str:
    """Where a process number means one process: this boot of this host, and this container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    boot_id = boot.read_text().strip() if boot.is_file() else socket.gethostname()
    space = Path("/proc/self/ns/pid")
    return f"{boot_id}/{os.readlink(space) if space.is_symlink() else ''}"


def _born(pid: int) -> int | None:
    """When a process started, in ticks since boot; None if it has ended."""
    stat = _stat(pid)
    return None if stat is None or stat[0] in ("Z", "X") else int(stat[19])


def ancestry() -> Iterator[tuple[int, int]]:
    """Number and start of this process, its parent, and so on."""
    pid = os.getpid()
    while pid > 0 and (stat := _stat(pid)) is not None:
        yield pid, int(stat[19])
        pid = int(stat[1])


def _stat(pid: int) -> Sequence[str] | None:
    """Fields of /proc/PID/stat from the state on; None where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()
