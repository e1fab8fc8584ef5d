"""Trials as process trees of this machine, several at once, each with its share of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dtune_launch.gpus import count_cores, visible_gpus
from dtune_launch.local import exit_code, forwarding_signals, kill_tree, start_job
from dtune_launch.spec import JobSpec

from dtune.errors import ConfigError
from dtune.runtime.signals import SIGNALS
from dtune.runtime.status import State, Status, status_of, write_status
from dtune.sweep.folder import Attempt, Pruned, add_attempt, mark_pruned, read_trial
from dtune.sweep.standing import SweepView, line_of

_POLL_SECONDS = 0.1
_LOOK_SECONDS = 0.5


class Watch(Protocol):
    """What a search sees of the trials while they run."""

    def judge(self, number: int, evaluations: Sequence[Mapping[str, float]]) -> Pruned | None:
        """Why a trial is hopeless, by its held-out evaluations so far; None where it is not."""
        ...


@dataclass(frozen=True)
class Task:
    """A trial that is ready to be started."""

    number: int
    folder: Path
    nproc: int
    max_restarts: int
    save_seconds: float = JobSpec.save_seconds
    """As of its processes."""

    def job(self, env: Mapping[str, str]) -> JobSpec:
        """Its processes."""
        return JobSpec(
            module="dtune.worker",
            arguments=(str(self.folder),),
            run_dir=self.folder,
            nproc=self.nproc,
            max_restarts=self.max_restarts,
            save_seconds=self.save_seconds,
            env=env,
        )


@dataclass(frozen=True)
class Limits:
    """How trials are run on this machine."""

    parallel: int = 1
    max_minutes: float = 0
    grace_seconds: float = 120


@dataclass
class _Running:
    task: Task
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)
    asked_to_stop: float = 0.0
    """When; 0: not yet."""
    timed_out: bool = False


def gpus_of_slot(slot: int, parallel: int) -> list[str]:
    """The GPUs of one of so many trials at once."""
    gpus = visible_gpus()
    share = len(gpus) // parallel
    return gpus[slot * share : (slot + 1) * share]


def run_local(
    view: SweepView, tasks: Sequence[Task], limits: Limits, watch: Watch | None = None
) -> bool:
    """Run the trials, at most ``parallel`` at once; a line as each ends. Whether all were started.

    A trial that fails stops no other. A signal stops those that run and starts no further one.
    """
    waiting = list(tasks)
    running: dict[int, _Running] = {}
    processes: list[subprocess.Popen[bytes]] = []
    looked = time.monotonic()
    with forwarding_signals(processes) as received:
        while running or (waiting and not received):
            for slot in set(range(limits.parallel)) - set(running):
                if waiting and not received:
                    _start_held(waiting.pop(0), slot, limits.parallel, running, processes)
            time.sleep(_POLL_SECONDS)
            for slot in [slot for slot, job in running.items() if job.process.poll() is not None]:
                _tell_ended(view, running.pop(slot), limits)
            if time.monotonic() - looked > _LOOK_SECONDS:
                looked = time.monotonic()
                for job in running.values():
                    _look_after(view, job, limits, watch)
    return not received


def _start_held(
    task: Task,
    slot: int,
    parallel: int,
    running: dict[int, _Running],
    processes: list[subprocess.Popen[bytes]],
) -> None:
    """Start a trial; a signal that comes now is passed on as soon as there is somebody to hear."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        running[slot] = _start(task, slot, parallel)
        processes.append(running[slot].process)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _start(task: Task, slot: int, parallel: int) -> _Running:
    env = {}
    if parallel > 1:
        if "OMP_NUM_THREADS" not in os.environ:
            env["OMP_NUM_THREADS"] = str(max(1, count_cores() // (parallel * task.nproc)))
        if gpus := gpus_of_slot(slot, parallel):
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    logs = task.folder / "logs"
    logs.mkdir(exist_ok=True)
    add_attempt(task.folder, Attempt())
    with open(logs / "terminal.log", "ab") as output:
        return _Running(task, start_job(task.job(env), output))


def _look_after(view: SweepView, job: _Running, limits: Limits, watch: Watch | None) -> None:
    """Ask a trial to stop that is hopeless or out of time; kill one that does not listen."""
    now = time.monotonic()
    if job.asked_to_stop:
        if job.timed_out and now - job.asked_to_stop > limits.grace_seconds:
            kill_tree(job.process.pid)
        return
    folder = job.task.folder
    if limits.max_minutes and now - job.started > 60 * limits.max_minutes:
        job.timed_out = True
        _ask_to_stop(job)
    elif watch and (pruned := watch.judge(job.task.number, view.evaluations(folder))):
        mark_pruned(folder, pruned)
        _ask_to_stop(job)


def _ask_to_stop(job: _Running) -> None:
    job.asked_to_stop = time.monotonic()
    if job.process.poll() is None:
        os.kill(job.process.pid, signal.SIGTERM)


def _tell_ended(view: SweepView, ended: _Running, limits: Limits) -> None:
    """Say on the terminal how a trial ended, and in its folder where it could not say so itself."""
    folder = ended.task.folder
    status, damage = status_of(folder)
    if status.state is State.running:
        why = f"exit code {exit_code(ended.process.returncode)}"
        if ended.timed_out:
            why = f"killed: it did not stop at hydra.launcher.max_minutes={limits.max_minutes:g}"
        if damage:
            (folder / "status.json").unlink(missing_ok=True)
            why = f"{why}; {damage}"
        write_status(folder, Status(State.failed, step=status.step, message=why))
    standing = view.look_at(folder, read_trial(folder))
    line, *more = line_of(standing, view.record.objective).split("\n")
    say("\n".join([f"{line}  {time.monotonic() - ended.started:.0f} s", *more]))


def say(text: str) -> None:
    """A line on the terminal, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run_in_background(view: SweepView) -> None:
    """Start a process of its own that runs what is not done of a sweep; return once it has begun.

    Raises ConfigError where it does not begin.
    """
    log = view.folder / "launcher.log"
    command = [sys.executable, "-m", "dtune", "sweep", "resume", str(view.folder)]
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [*command, "hydra.launcher.wait=true"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    while not view.is_at_work(view.look()) and process.poll() is None:
        time.sleep(_POLL_SECONDS)
    if process.poll():
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise ConfigError(f"the process in the background has ended: {''.join(last)}; see {log}")
    say(f"process {process.pid} goes on with them; log: {log}")
