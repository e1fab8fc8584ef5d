"""Runs a job on this machine and waits for it."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from dtune_launch.gpus import count_cores
from dtune_launch.spec import JobSpec
from dtune_launch.torchrun import job_environment, torchrun_command, worker_command

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def is_one_process(spec: JobSpec) -> bool:
    """Whether the job needs no agent: one process, which is not started again."""
    return spec.nproc == 1 and spec.nodes == 1 and spec.max_restarts == 0


def job_command(spec: JobSpec) -> list[str]:
    """Command of the job: the module itself for one process, torchrun for more."""
    return worker_command(spec) if is_one_process(spec) else torchrun_command(spec)


def describe_job(spec: JobSpec) -> str:
    """The job as a shell would take it, for ``launch.dry_run``."""
    return _describe(spec, job_command(spec))


def describe_torchrun(spec: JobSpec) -> str:
    """The same, through torchrun for one process as well."""
    return _describe(spec, torchrun_command(spec))


def _describe(spec: JobSpec, command: Sequence[str]) -> str:
    added = job_environment(spec, os.environ, count_cores())
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in added.items())
    return f"{variables} {shlex.join(command)}"


def never() -> bool:
    """Of a job that nobody has asked to stop before it is started."""
    return False


def run_job(spec: JobSpec, is_stopped: Callable[[], bool] = never) -> int:
    """Run the job on this terminal to its end; its exit code as `exit_code` says it.

    ``is_stopped`` says whether a signal came before: then nothing is started.
    """
    return _run(spec, job_command(spec), is_stopped)


def run_torchrun(spec: JobSpec, is_stopped: Callable[[], bool] = never) -> int:
    """The same, through torchrun for one process as well."""
    return _run(spec, torchrun_command(spec), is_stopped)


def _run(spec: JobSpec, command: Sequence[str], is_stopped: Callable[[], bool]) -> int:
    running: list[subprocess.Popen[bytes]] = []
    # One that comes from here on is passed on as soon as there is somebody to pass it on to.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    with forwarding_signals(running):
        try:
            if is_stopped():
                return exit_code(-signal.SIGTERM)
            running.append(_start(spec, command, None))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
        return exit_code(running[0].wait())


def start_job(spec: JobSpec, output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Start the job; ``output`` takes what its first rank would write to the terminal."""
    return _start(spec, job_command(spec), output)


def _start(
    spec: JobSpec, command: Sequence[str], output: IO[bytes] | None
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        env={**os.environ, **job_environment(spec, os.environ, count_cores())},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        # Ctrl-C reaches only this process, which asks the ranks once instead of killing them.
        start_new_session=True,
        preexec_fn=_hold_signals if is_one_process(spec) else _hold_usr1,
    )


def exit_code(returncode: int) -> int:
    """Exit code of an ended process as a shell says it: 128 + n where signal n ended it.

    It only says that something went wrong; ``RUN/status.json`` says what.
    """
    return returncode if returncode >= 0 else 128 - returncode


def _hold_usr1() -> None:
    # The agent would die of it. Ignoring survives exec, and so does blocking: one that comes to a
    # rank before it has installed its handler waits for that, instead of being lost.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGUSR1})


def _hold_signals() -> None:
    # A rank without an agent: neither may end it before it has installed its handlers.
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGUSR1, signal.SIGTERM})


@contextmanager
def forwarding_signals(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass signals on to the jobs that run at the time; only in the main thread.

    A first SIGINT, and SIGTERM and SIGUSR1, ask the ranks to save and stop; a second SIGINT kills
    them. Yields the list of what has come, which grows.
    """
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            if process.returncode is not None:
                continue
            if received.count(signal.SIGINT) > 1:
                kill_tree(process.pid)
            elif number == signal.SIGUSR1:
                # The agent ignores it, so its ranks are told one by one.
                for pid in (process.pid, *_children(process.pid)):
                    _send(pid, signal.SIGUSR1)
            else:
                _send(process.pid, signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def kill_tree(pid: int) -> None:
    """SIGKILL a process and everything it started, which torchrun puts into other sessions."""
    family = [pid]
    for member in family:
        family.extend(_children(member))
    for member in family:
        _send(member, signal.SIGKILL)


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # It has just ended.


def _children(pid: int) -> list[int]:
    """Processes whose parent is ``pid``."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "pid (name) state ppid ...", where the name may hold spaces and parentheses.
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except (FileNotFoundError, ProcessLookupError):
            continue  # It has just ended.
        if int(parent) == pid:
            found.append(int(stat.parent.name))
    return found
