"""The one checkpoint of a run that begins with what others have trained."""

from __future__ import annotations

import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from dtune.build import (
    BuiltModel,
    RunData,
    build_data,
    build_trained_model,
    prepare_engine,
    weights_of,
)
from dtune.checkpoint.layout import PARAM, dump_json
from dtune.checkpoint.manifest import Identity
from dtune.checkpoint.publish import write_step
from dtune.checkpoint.reader import CHECKPOINTS
from dtune.checkpoint.rng import capture_rng
from dtune.checkpoint.schema import CheckpointConfig
from dtune.checkpoint.snapshot import HostRange, Snapshot
from dtune.checkpoint.universal import (
    MASTER,
    MOMENTS,
    UniversalCheckpoint,
    open_universal,
    plain_name,
)
from dtune.checkpoint.writer import Checkpointer
from dtune.commands.trained import without_backward
from dtune.config.identity import identity_of
from dtune.config.run import RunConfig
from dtune.errors import ConfigError
from dtune.models.load import load_tokenizer
from dtune.parallel.scaling import LossScale
from dtune.parallel.schema.single import SingleConfig
from dtune.runtime.logs import log
from dtune.runtime.schema import Precision
from dtune.runtime.world import World
from dtune.train.participant import WithMethod
from dtune.train.progress import RunProgress
from dtune.types import TakesPartInSteps


@dataclass(frozen=True)
class _Run:
    """What a checkpoint is of."""

    config: RunConfig
    built: BuiltModel
    data: RunData
    identity: Identity


def _build(config: RunConfig, world: World) -> _Run:
    built = build_trained_model(config, load=True, device=world.device)
    data = build_data(config, load_tokenizer(config.model), world, world_size=1)
    last = data.loader.sequences_until(data.total_steps)
    return _Run(
        config, built, data, identity_of(config, data.train.fingerprint, last_sequence=last)
    )


def write_start(config: RunConfig, folder: Path, world: World) -> int:
    """Write step 0 of a run that begins with ``peft.init_from``, or with its model as it is."""
    run = _build(config, world)
    weights = weights_of(run.built, seed=config.seed, start=config.peft.start)
    engine = SingleConfig().build(world, config.precision.name)
    forward = replace(config, train=without_backward(config.train))
    prepare_engine(engine, run.built, forward, weights, run.data.total_steps)
    method = run.built.method
    participant = method if isinstance(method, TakesPartInSteps) else None
    once = CheckpointConfig(asynchronous=False)
    with Checkpointer(folder / CHECKPOINTS, once, world) as checkpointer:
        state = WithMethod(engine, participant, world).state()
        progress = asdict(RunProgress())
        checkpointer.save(0, state, progress, is_best=False, identity=run.identity)
    return 0


def write_universal(source: Path, steps: int, config: RunConfig, folder: Path, world: World) -> int:
    """Write what DeepSpeed has trained, with its optimizer state; the step that it is of.

    Tensors are mapped from their files and written one at a time. ConfigError where the run is
    another: its parameters, their shapes, or its optimizer.
    """
    found = open_universal(source, steps=steps)
    run = _build(config, world)
    names = _trained(run, found)
    _warn_of_samples(found, config)
    progress = RunProgress(step=found.steps)
    facts = {
        "step": found.steps,
        "scalars": _scalars(config, found),
        "extra": asdict(progress),
        "rng_ranks": 1,
    }
    ranges = [
        HostRange(f"{prefix}{name}", 0, found.read(plain_name(name), key, shape))
        for name, shape in names.items()
        for key, prefix in ((MASTER, PARAM), *((moment, f"{moment}/") for moment in MOMENTS))
    ]
    shapes = {part.name: names[part.name.partition("/")[2]] for part in ranges}
    snapshot = Snapshot(
        step=found.steps,
        ranges=ranges,
        shapes=shapes,
        dtypes=dict.fromkeys(shapes, torch.float32),
        rng=capture_rng(world.device),
        state=dump_json(facts),
        identity=run.identity,
        best_step=-1,
    )
    (folder / CHECKPOINTS).mkdir()
    write_step(
        snapshot,
        folder=folder / CHECKPOINTS,
        world=world,
        attempt=secrets.token_hex(4),
        keep=1,
        read_back=config.checkpoint.read_back,
    )
    return found.steps


def _trained(run: _Run, found: UniversalCheckpoint) -> dict[str, tuple[int, ...]]:
    """Parameters that the run trains and their shapes, if they are those of the checkpoint."""
    config, built = run.config, run.built
    if config.optim.name != "adamw":
        raise ConfigError(
            f"optim={config.optim.name}: a universal checkpoint is read with the state of AdamW "
            f"({', '.join(MOMENTS)}); set optim=adamw"
        )
    assert built.stored is not None
    if (
        isinstance(built.method, TakesPartInSteps)
        or built.method.base(built.stored) is not built.stored
    ):
        raise ConfigError(
            f"peft={config.peft.name}: DeepSpeed has not saved all that this method needs to go "
            "on; set peft=full or peft=lora"
        )
    trained = {n: tuple(p.shape) for n, p in built.model.named_parameters() if p.requires_grad}
    own, theirs = {plain_name(name) for name in trained}, set(found.folders)
    if own != theirs:
        lacking, extra = sorted(own - theirs), sorted(theirs - own)
        shown = [f"it has no {name}" for name in lacking[:2]]
        shown += [f"it has {name}" for name in extra[:2]]
        raise ConfigError(
            f"{found.path} is of another model or method than model.path={config.model.path} with "
            f"peft={config.peft.name}: {', '.join(shown)} ({len(lacking)} missing, {len(extra)} "
            "too many); set model and peft as they were"
        )
    if found.steps > run.data.total_steps:
        raise ConfigError(
            f"{found.path} is of step {found.steps}, and the run ends at step "
            f"{run.data.total_steps}: raise train.max_steps or train.epochs"
        )
    return trained


def _warn_of_samples(found: UniversalCheckpoint, config: RunConfig) -> None:
    expected = found.steps * config.train.global_batch_size
    if found.samples and found.samples != expected:
        log.warning(
            "%s has taken %d sequences in %d steps, and train.global_batch_size=%d makes that %d: "
            "the data goes on after the latter",
            found.path,
            found.samples,
            found.steps,
            config.train.global_batch_size,
            expected,
        )


def _scalars(config: RunConfig, found: UniversalCheckpoint) -> dict[str, float | int]:
    """What engines have beside tensors; a loss scale starts anew."""
    taken = found.steps - found.skipped
    scale = LossScale().state() if config.precision.name is Precision.fp16 else {}
    return {
        "skipped_steps": found.skipped,
        "schedule_position": taken,
        "optimizer_step": taken,
        **scale,
    }
