"""Going on from a checkpoint: found and checked before the weights, adopted after."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dtune.build import BuiltModel
from dtune.checkpoint.adopt import Held, adopt_checkpoint
from dtune.checkpoint.manifest import Identity, check_identity, check_parameters
from dtune.checkpoint.reader import CHECKPOINTS, CheckpointInfo, find_checkpoint
from dtune.checkpoint.space import check_space
from dtune.checkpoint.visible import may_pass
from dtune.config.run import RunConfig
from dtune.errors import CheckpointError, ConfigError
from dtune.run_folder import ALL_EXPORTS, remove_exports
from dtune.runtime.logs import log
from dtune.runtime.world import World
from dtune.train.progress import RunProgress


def find_own_checkpoint(
    run: RunConfig, built: BuiltModel, identity: Identity, total_steps: int, world: World
) -> CheckpointInfo | None:
    """The checkpoint to go on from, checked against this run; ConfigError if it does not fit."""
    run_dir = Path(run.run_dir)
    check_space(
        run_dir,
        trained=built.report.trainable,
        state_bytes=run.optim.state_bytes,
        keep=run.checkpoint.keep,
        exported_bytes=built.method.exported_bytes(),
        exports=ALL_EXPORTS,
        world=world,
    )
    try:
        found = find_checkpoint(run_dir, run.resume, world)
    except CheckpointError as error:
        if may_pass(str(error)):
            raise
        raise ConfigError(f"resume={run.resume}: {error}") from error
    if found is None:
        return None
    trained = {
        name: tuple(parameter.shape)
        for name, parameter in built.model.named_parameters()
        if parameter.requires_grad
    }
    check_identity(found.path, found.manifest.identity, identity)
    check_parameters(found.path, found.manifest.parameters, trained)
    check_steps_left(found, run, total_steps)
    log.info("going on from %s", found.path)
    before = (found.manifest.world_size, found.manifest.identity.engine)
    if before != (world.size, run.parallel.name):
        log.info(
            "it was saved by %d ranks under parallel=%s; they are %d under parallel=%s now",
            *before,
            world.size,
            run.parallel.name,
        )
    return found


def check_steps_left(found: CheckpointInfo, run: RunConfig, total_steps: int) -> None:
    """ConfigError where the run would end before the step that it goes on from."""
    if total_steps < found.step:
        key, value = ("train.epochs", f"{run.train.epochs:g}")
        if run.train.max_steps:
            key, value = ("train.max_steps", str(run.train.max_steps))
        raise ConfigError(
            f"{found.path} is of step {found.step}, and {key}={value} ends the run at step "
            f"{total_steps}: raise it, or name an earlier step, resume=RUN/checkpoints/step-..."
        )
    taken, last = found.step * run.train.global_batch_size, found.manifest.identity.last_sequence
    if 0 < last < taken and total_steps > found.step:
        log.warning(
            "step %d was the end of the data and part empty: the %d sequences that would fill it "
            "are left out of the epochs that come now",
            found.step,
            taken - last,
        )


def go_on(
    found: CheckpointInfo, run_dir: Path, total_steps: int, world: World
) -> tuple[RunProgress, Held]:
    """Prepare the run folder for what comes after a checkpoint that has been loaded; collective.

    What was best in another folder, or is not there any more, is best no longer.
    """
    progress = RunProgress.parse(found.extra)
    held = adopt_checkpoint(found, run_dir / CHECKPOINTS, best_step=progress.best_step, world=world)
    if held.best_step < 0:
        progress = dataclasses.replace(
            progress, best_step=-1, best_value=0.0, evaluations_without_gain=0
        )
    if world.is_first and found.step < total_steps:
        remove_exports(run_dir)
    return progress, held
