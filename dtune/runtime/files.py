"""Files that are whole or not there: everything durable goes to disk through here."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".tmp-"
"""Names that begin so were never published; whoever owns the folder may delete them at start."""


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder (new names, renames) survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file below a folder, and the folders, innermost first."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            with open(Path(parent, name), "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(parent))


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and flush it; the caller publishes the folder that it lies in."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def drop_from_memory(path: Path) -> None:
    """Let the next read of a flushed file come from the disk, where the system heeds that."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def publish_text(path: Path, text: str) -> None:
    """Replace a small file in one step: a reader sees the old text or the new one."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")
    try:
        write_durably(temporary, text.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def remove_tree(folder: Path) -> None:
    """Delete a published folder so that no half of it is ever seen under its name."""
    doomed = folder.with_name(f"{TEMPORARY}deleted-{folder.name}-{secrets.token_hex(4)}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


@contextmanager
def published_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``target`` when the block ends well, and vanishes if not.

    An older ``target`` is replaced: it is moved aside before and deleted after. One process
    writes a target at a time; what a dead one left of it is deleted.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{TEMPORARY}{target.name}-"
    for leftover in target.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover)
    temporary = target.with_name(f"{prefix}{secrets.token_hex(4)}")
    aside = target.with_name(f"{prefix}old-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        if target.exists():
            os.rename(target, aside)
        os.rename(temporary, target)
        sync_folder(target.parent)
    finally:
        for path in (temporary, aside):
            with suppress(FileNotFoundError):
                shutil.rmtree(path)
