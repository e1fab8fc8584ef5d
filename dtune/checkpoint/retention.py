"""What is kept, what is named LATEST and BEST, and what dead attempts left behind."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from dtune.checkpoint.layout import BEST, LATEST, list_steps, step_name
from dtune.runtime.files import TEMPORARY, publish_text, remove_tree

log = logging.getLogger("dtune")


def sweep(folder: Path) -> None:
    """Delete what earlier processes left unpublished."""
    for path in folder.glob(f"{TEMPORARY}*"):
        log.info("removing %s, left by an attempt that did not end", path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def publish_names(folder: Path, step: int, *, best_step: int) -> None:
    """Point LATEST and BEST at published steps; no BEST where ``best_step`` is -1."""
    publish_text(folder / LATEST, f"{step_name(step)}\n")
    best, text = folder / BEST, f"{step_name(best_step)}\n"
    if best_step < 0:
        best.unlink(missing_ok=True)
    elif not best.is_file() or best.read_text(encoding="utf-8") != text:
        publish_text(best, text)


def plan_removals(steps: list[int], *, newest: int, keep: int, best_step: int) -> list[int]:
    """Steps to delete once ``newest`` is published; later ones are left alone and not counted."""
    older = sorted(step for step in steps if step <= newest)
    return [step for step in older[:-keep] if step != best_step]


def prune(folder: Path, *, newest: int, keep: int, best_step: int) -> None:
    """Delete old checkpoints. A failure is only logged: nothing depends on it."""
    steps = list_steps(folder)
    for step in plan_removals(steps, newest=newest, keep=keep, best_step=best_step):
        try:
            remove_tree(folder / step_name(step))
        except OSError as error:
            log.warning("old checkpoint of step %d cannot be removed: %s", step, error)
