"""Files of other hosts, which a shared file system may show late."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from dtune.errors import CheckpointError

VISIBLE_SECONDS = 60.0
"""Time that a file system has to show on one host what another has written."""

_POLL_SECONDS = 0.1


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
