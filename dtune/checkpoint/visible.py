"""Files of other hosts, which a shared file system may show late, or not at all for a while."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from dtune.checkpoint.layout import describe_error
from dtune.errors import CheckpointError

T = TypeVar("T")

VISIBLE_SECONDS = 60.0
"""Time that a file system has to show on one host what another has written."""

PASSING = frozenset({"EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "ENODEV", "ENXIO", "ENOTCONN"})
"""What file systems say that are away for a while, those of networks above all."""

_POLL_SECONDS = 0.1
_AGAIN_SECONDS = 1.0


def may_pass(said: str) -> bool:
    """Whether the disk failed, as it may not do again; a full one is for the user to mend.

    By the name of the error, which is all that comes from other ranks.
    """
    names = set(re.findall(r"\((E[A-Z0-9]+)\)", said))
    return bool(names) and names <= PASSING


def await_visible(sizes: Mapping[Path, int]) -> None:
    """Wait until every file is seen here in the size that its writer gave it.

    CheckpointError names the first that is not, after VISIBLE_SECONDS for all of them together.
    """
    deadline = time.monotonic() + VISIBLE_SECONDS
    for path, size in sizes.items():
        while not path.is_file() or path.stat().st_size != size:
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{path} is seen by another rank and for {VISIBLE_SECONDS:.0f} s not here; "
                    "run_dir must lie on a file system that all hosts share"
                )
            time.sleep(_POLL_SECONDS)


def await_file(path: Path) -> None:
    """Wait for a file, for VISIBLE_SECONDS at most; whoever reads it says if it is not there."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not path.is_file() and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def read_patiently(read: Callable[[], T], otherwise: T) -> tuple[T, str]:
    """What ``read`` gives, or ``otherwise`` and why not.

    Where the file system is away it is asked again, for VISIBLE_SECONDS.
    """
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        try:
            return read(), ""
        except CheckpointError as error:
            said = str(error)
        except OSError as error:
            said = describe_error(error)
        if not may_pass(said) or time.monotonic() > deadline:
            return otherwise, said
        time.sleep(_AGAIN_SECONDS)
