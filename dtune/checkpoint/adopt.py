"""Making the checkpoints of a run folder those of the run that goes on in it."""

from __future__ import annotations

import logging
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from dtune.checkpoint.layout import list_steps, naming, step_name
from dtune.checkpoint.publish import together
from dtune.checkpoint.reader import CheckpointInfo, is_in
from dtune.checkpoint.retention import publish_names
from dtune.runtime.world import World

log = logging.getLogger("dtune")


@dataclass(frozen=True)
class Held:
    """Which steps of a run its own folder holds; -1: none."""

    saved_step: int = -1
    """The one it goes on from."""
    best_step: int = -1


def adopt_checkpoint(found: CheckpointInfo, folder: Path, *, best_step: int, world: World) -> Held:
    """Prepare the checkpoints of a run folder for going on from ``found``; collective.

    Later steps, which the run will do anew, are renamed to ``*.superseded-*`` and never touched
    again; LATEST and BEST name what is left. ``best_step`` is what the checkpoint takes for the
    best: it counts as long as the folder holds it, or is about to.

    Raises CheckpointError on every rank where the folder cannot be changed.
    """
    return together(world, lambda: _adopt(found, folder, best_step, world))[0]


def _adopt(found: CheckpointInfo, folder: Path, best_step: int, world: World) -> Held:
    own = is_in(found.path, folder)
    if not world.is_first:
        return Held()
    with naming(folder):
        steps = list_steps(folder)
        kept = [step for step in steps if own and step <= found.step]
        _set_aside(folder, [step for step in steps if step not in kept])
        held = Held(
            saved_step=found.step if own else -1,
            best_step=best_step if best_step in (*kept, found.step) else -1,
        )
        if own:
            publish_names(folder, found.step, best_step=held.best_step)
    return held


def _set_aside(folder: Path, steps: list[int]) -> None:
    attempt = secrets.token_hex(4)
    for step in steps:
        path = folder / step_name(step)
        aside = path.with_name(f"{path.name}.superseded-{attempt}")
        log.warning("%s is after the step that the run goes on from; kept as %s", path, aside.name)
        os.rename(path, aside)
