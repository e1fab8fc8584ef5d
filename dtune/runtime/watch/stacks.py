"""Where a process is: its Python stacks, and what the kernel says of it. Standard library only."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

DUMP_SECONDS = 2.0


def process_state(pid: int) -> str:
    """The kernel's letter for a process: R, S, D, T, t, Z; empty where there is none to read."""
    try:
        # "pid (name) state ...", where the name may hold spaces and parentheses.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def write_stacks(path: Path, pid: int, dump: int, heading: str) -> str:
    """Write where a process is to ``path``; the innermost frames, for a message.

    ``dump`` is the file that the handler of SIGUSR2 in that process writes its stacks to, which
    needs no lock of Python's. A stopped process is let go on for that moment.
    """
    lines = [heading, "", *_kernel_facts(pid)]
    stopped = process_state(pid) in ("T", "t")
    python = _ask(pid, dump, wake=stopped)
    if not python:
        python = "none came: the process does not take signals\n"
    text = "\n".join([*lines, "", "Python stacks, innermost call first:", "", python])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return _innermost(python)


def _ask(pid: int, dump: int, *, wake: bool) -> str:
    os.ftruncate(dump, 0)
    try:
        os.kill(pid, signal.SIGUSR2)
        if wake:
            os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return ""
    deadline, size = time.monotonic() + DUMP_SECONDS, -1
    while time.monotonic() < deadline:
        time.sleep(0.05)
        now = os.fstat(dump).st_size
        if now and now == size:
            break
        size = now
    if wake:
        # Nothing of the step that it was in is to go on.
        _send_stop(pid)
    return os.pread(dump, 1 << 20, 0).decode(errors="replace").lstrip("\0")


def _send_stop(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGSTOP)
    except ProcessLookupError:
        return  # It has ended.


def _kernel_facts(pid: int) -> list[str]:
    """State of every thread, and where the kernel has it wait."""
    root, lines = Path(f"/proc/{pid}"), []
    try:
        wanted = ("State", "VmRSS", "Threads", "SigPnd", "ShdPnd", "SigBlk", "TracerPid")
        status = (root / "status").read_text().splitlines()
        lines += [line for line in status if line.split(":")[0] in wanted]
        threads = sorted(root.glob("task/[0-9]*"), key=lambda task: int(task.name))
    except OSError as error:
        return [f"/proc/{pid}: {error.strerror}"]
    for task in threads:
        name, waits = _read(task / "comm"), _read(task / "wchan")
        lines.append(f"thread {task.name} {name} {process_state_of(task)} {waits}")
        if kernel := _read(task / "stack"):
            lines += [f"    {line}" for line in kernel.splitlines()[:8]]
    return lines


def process_state_of(task: Path) -> str:
    """The kernel's letter for a thread."""
    return _read(task / "stat").rpartition(")")[2].strip()[:1]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""  # Ended meanwhile, or only for root.


def _innermost(python: str, frames: int = 3) -> str:
    """First frames of the main thread, which faulthandler shows last."""
    blocks = [block for block in python.split("\n\n") if "most recent call first" in block]
    if not blocks:
        return ""
    lines = [line.strip() for line in blocks[-1].splitlines()[1:]]
    return " < ".join(line for line in lines[:frames] if line.startswith("File "))
