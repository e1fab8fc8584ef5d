"""One run in a folder at a time: ``RUN/run.lock`` names the processes that work there.

A lock lives as long as one of the processes in it. The launching process takes it, and the first
rank, which it started, joins it: so whichever of the two is killed, the folder stays taken until
the other has ended too, and what is left behind by both is taken over with a word.

Taking over has exactly one winner without any lock of the file system's own: who finds the lock
with token T dead creates ``run.lock.T``, which only one process can; the last file of such a chain
is the lock. The winner then moves its file to ``run.lock``.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dtune.errors import ConfigError
from dtune.runtime.files import TEMPORARY
from dtune.runtime.processes import (
    Holder,
    ancestry,
    is_alive,
    is_earlier_attempt,
    is_same,
    job_is_over,
    this_machine,
    this_process,
)

LOCK = "run.lock"
BEAT_SECONDS = 15.0
STALE_SECONDS = 180.0
"""A holder on another host that has not touched the lock for so long is gone."""

# Without hard links (some network and removable file systems) a new file is not written at once.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_UNWRITTEN_SECONDS = 5.0
_POLL_SECONDS = 0.2
_UNFINISHED_SECONDS = 60.0


@dataclass(frozen=True)
class Lock:
    """Contents of the file."""

    token: str
    holders: tuple[Holder, ...]


@contextmanager
def holding(folder: Path, *, patience: float = 0.0, joins: bool = False) -> Iterator[None]:
    """Hold the lock of a run folder, which is made where it is absent, for the block.

    Within the process and its children it may be held again. Raises ConfigError that names the
    process that holds it for longer than ``patience`` seconds; a lock whose processes are gone is
    taken over with a line on stderr. ``joins``: who holds it belongs to the same run.
    """
    deadline = time.monotonic() + patience
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while (lock := _take(folder, deadline, joins=joins)) is None:
            time.sleep(_POLL_SECONDS)
    except OSError as error:
        raise ConfigError(f"run_dir={folder} cannot be written: {error.strerror}") from error
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(folder, stop), name="run.lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        # What cannot be removed is taken over by the next run, once this process has ended.
        with suppress(OSError):
            _release(folder, lock)


def is_held_here(folder: Path) -> bool:
    """Whether this process, or one that has started it, holds the lock."""
    found = _last(folder)
    return found is not None and _is_mine(found[1])


def check_free(folder: Path) -> None:
    """ConfigError where another run works in the folder."""
    found = _last(folder)
    if found is not None and not _is_mine(found[1]) and (holder := _living(found)):
        raise ConfigError(_refusal(folder, holder))


def check_held(folder: Path) -> str:
    """Who else has the folder by now; empty where nobody has.

    A process that stood still for long may have been taken for dead.
    """
    found = _last(folder)
    if found is None or _is_mine(found[1]):
        return ""
    holder = _living(found)
    return holder.describe() if holder else ""


def _take(folder: Path, deadline: float, *, joins: bool) -> Lock | None:
    """The lock, created, joined or taken over; where it is held, None, or later ConfigError."""
    mine = Lock(secrets.token_hex(8), (this_process(),))
    while True:
        found = _last(folder)
        if found is None:
            if _create(folder / LOCK, mine):
                return mine
            continue
        path, lock = found
        if joins or _is_mine(lock):
            return _join(folder, path, lock)
        if holder := _living(found):
            if time.monotonic() >= deadline:
                raise ConfigError(_refusal(folder, holder))
            return None
        if taken := _take_over(folder, path, lock, mine):
            return taken


def _take_over(folder: Path, path: Path, dead: Lock, mine: Lock) -> Lock | None:
    """The lock in place of a dead one; None where somebody else was faster."""
    ticket = folder / f"{LOCK}.{dead.token}"
    if not _create(ticket, mine):
        return None
    # Another may have taken over and tidied up between the look and the ticket, or a process
    # that the dead one has started may have joined it.
    chain = _chain(folder)
    tokens = [lock.token for _, lock in chain]
    if mine.token not in tokens or any(_living(link) for link in chain if link[1] != mine):
        ticket.unlink(missing_ok=True)
        return None
    os.replace(ticket, folder / LOCK)
    for old, lock in chain:
        if old.name != LOCK and lock.token != mine.token:
            old.unlink(missing_ok=True)
    what = dead.holders[-1].describe() if dead.holders else f"nobody ({path.name} was empty)"
    _say(f"{folder / LOCK} was left by {what}, which is gone: taken over")
    return mine


def _join(folder: Path, path: Path, lock: Lock) -> Lock:
    """Add this process to a lock that it or an ancestor holds."""
    own = this_process()
    if any(is_same(holder, own) for holder in lock.holders):
        return Lock("", ())  # Whoever holds it further out will release it.
    joined = Lock(lock.token, (*_others(lock, own), own))
    _write(path, joined)
    return joined


def _release(folder: Path, lock: Lock) -> None:
    """Leave the lock; remove it if nobody else holds it."""
    found = _last(folder)
    if not lock.token or found is None or found[1].token != lock.token:
        return
    path, now = found
    if others := _others(now, this_process()):
        _write(path, Lock(now.token, others))
        return
    path.unlink(missing_ok=True)
    # Of processes that were killed while they tried to take it.
    for left in [*folder.glob(f"{LOCK}.*"), *folder.glob(f"{TEMPORARY}{LOCK}*")]:
        if _age(left) > _UNFINISHED_SECONDS:
            left.unlink(missing_ok=True)


def _others(lock: Lock, own: Holder) -> tuple[Holder, ...]:
    """Who holds the lock beside a process, without those that are gone."""
    return tuple(
        holder
        for holder in lock.holders
        if not is_same(holder, own) and not is_earlier_attempt(holder, own) and is_alive(holder)
    )


def _beat(folder: Path, stop: threading.Event) -> None:
    """Touch the lock until asked to stop: what processes on other hosts go by."""
    while not stop.wait(BEAT_SECONDS):
        # A file system that stalls now may answer at the next beat.
        with suppress(OSError):
            found = _last(folder)
            if found is not None and _is_mine(found[1]):
                os.utime(found[0])


def _chain(folder: Path) -> list[tuple[Path, Lock]]:
    """``run.lock`` and what has taken it over, oldest first; empty where nobody holds it."""
    chain: list[tuple[Path, Lock]] = []
    path = folder / LOCK
    while (lock := _read(path)) is not None:
        chain.append((path, lock))
        path = folder / f"{LOCK}.{lock.token}"
    return chain


def _last(folder: Path) -> tuple[Path, Lock] | None:
    chain = _chain(folder)
    return chain[-1] if chain else None


def _read(path: Path) -> Lock | None:
    """The lock in a file; None where there is no file."""
    deadline = time.monotonic() + _UNWRITTEN_SECONDS
    while True:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            record = json.loads(data)
            holders = tuple(
                Holder(**{**holder, "attempt": tuple(holder["attempt"])})
                for holder in record["holders"]
            )
            return Lock(str(record["token"]), holders)
        except (ValueError, KeyError, TypeError):
            if time.monotonic() > deadline:
                return Lock("damaged", ())
        time.sleep(0.05)


def _create(path: Path, lock: Lock) -> bool:
    """Whether this process has created the file, with all of its contents at once."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(_dump(lock))
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create_unlinked(path, lock)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _create_unlinked(path: Path, lock: Lock) -> bool:
    try:
        with open(path, "xb") as file:
            file.write(_dump(lock))
    except FileExistsError:
        return False
    return True


def _write(path: Path, lock: Lock) -> None:
    """Replace the contents in one step."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(_dump(lock))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _dump(lock: Lock) -> bytes:
    record = {"token": lock.token, "holders": [asdict(holder) for holder in lock.holders]}
    return (json.dumps(record, indent=1) + "\n").encode()


def _is_mine(lock: Lock) -> bool:
    """Whether this process or one that started it holds the lock, or its job goes on with it."""
    own = this_process()
    if any(is_earlier_attempt(holder, own) for holder in lock.holders):
        return True
    near = {holder.pid: holder.born for holder in lock.holders if holder.machine == own.machine}
    return any(near.get(pid) == born for pid, born in ancestry())


def _living(found: tuple[Path, Lock]) -> Holder | None:
    """A holder that is at work still."""
    path, lock = found
    machine = this_machine()
    for holder in lock.holders:
        if holder.machine == machine:
            if is_alive(holder):
                return holder
        elif _age(path) < STALE_SECONDS and not job_is_over(holder.job):
            return holder
    return None


def _age(path: Path) -> float:
    """Seconds since the last beat by the file system's clock, which all hosts share."""
    probe = path.with_name(f"{TEMPORARY}clock-{secrets.token_hex(4)}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _refusal(folder: Path, holder: Holder) -> str:
    return (
        f"run_dir={folder} is in use by {holder.describe()}: wait for its end or stop it, or name "
        f"another run_dir. Once it is gone, {LOCK} is taken over by itself"
    )


def _say(text: str) -> None:
    os.write(2, f"dtune: {text}\n".encode())
