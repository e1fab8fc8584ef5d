"""Room for checkpoints, asked about before a run starts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from dtune.checkpoint.layout import list_steps, step_name
from dtune.checkpoint.reader import CHECKPOINTS
from dtune.errors import ConfigError
from dtune.runtime.world import World

GIB = 1024**3


def check_space(
    run_dir: Path,
    *,
    trained: int,
    state_bytes: int,
    keep: int,
    exported_bytes: int,
    exports: Sequence[str],
    world: World,
) -> None:
    """Raise ConfigError, on every rank, where the disk cannot hold what will be there at once.

    That is ``keep`` newest checkpoints, the best, and the one being written, each of fp32 masters
    and optimizer state (``state_bytes`` a parameter) of ``trained`` parameters; and the exported
    weights. What the run has of them in ``run_dir`` already, is counted as room; ``exports`` are
    the names of exported folders.
    """
    problem = ""
    if world.is_first:
        one = trained * (4 + state_bytes)
        need = (keep + 2) * one + exported_bytes
        free = shutil.disk_usage(run_dir).free
        held = _held_bytes(run_dir, exports)
        if free + held < need:
            has = f" beside {held / GIB:.2f} GiB of its own" if held else ""
            problem = (
                f"run_dir={run_dir} has {free / GIB:.2f} GiB free{has}, but {keep + 2} checkpoints "
                f"of {one / GIB:.2f} GiB and {exported_bytes / GIB:.2f} GiB of exported weights "
                f"need {need / GIB:.2f}; free some, lower checkpoint.keep, or name a run_dir on "
                "another disk"
            )
    problem = world.broadcast(problem)
    if problem:
        raise ConfigError(problem)


def _held_bytes(run_dir: Path, exports: Sequence[str]) -> int:
    """Bytes of the run's published checkpoints and exports; not of those set aside, which stay."""
    checkpoints = run_dir / CHECKPOINTS
    folders = [checkpoints / step_name(step) for step in list_steps(checkpoints)]
    folders += [run_dir / name for name in exports]
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in files)
