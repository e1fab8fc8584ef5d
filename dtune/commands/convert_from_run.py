"""A step of a run as other tools read it: an adapter, or a whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dtune.build import BuiltModel, Weights, build_trained_model, prepare_engine, weights_of
from dtune.checkpoint.layout import BEST, PARAM
from dtune.checkpoint.manifest import check_parameters
from dtune.checkpoint.reader import (
    CHECKPOINTS,
    CheckpointInfo,
    CheckpointSource,
    find_checkpoint,
    open_whole,
)
from dtune.commands.trained import one_process, without_training
from dtune.config.freeze import read_frozen
from dtune.config.identity import model_identity
from dtune.config.run import RunConfig
from dtune.errors import CheckpointError, ConfigError
from dtune.models.load import load_tokenizer
from dtune.models.sources import ChainedSource, RenamedSource
from dtune.parallel.schema.single import SingleConfig
from dtune.runtime.world import World
from dtune.train.export import Exporter
from dtune.train.participant import METHOD
from dtune.types import TakesPartInSteps


def export_step(source: Path, is_run: bool, which: str, out: Path, settings: Sequence[str]) -> str:
    """Write what a checkpoint has trained; what to say of it.

    ``settings`` are keys over the run's frozen config, such as ``model.path`` of a base that has
    moved. Raises ConfigError where the checkpoint is not whole, or not of the base.
    """
    folder = _run_folder(source, is_run=is_run)
    config = without_training(_config(folder, settings))
    # The checkpoint has all that the run began with.
    config = replace(config, peft=replace(config.peft, init_from="none"))
    with one_process() as world:
        found = _find(source, folder, which, world, is_run=is_run)
        name = _export(config, found, out, world)
    how = f"model.path={out}"
    if name == "adapter":
        how = f"PeftModel.from_pretrained(base, {str(out)!r}), or peft.init_from={out}"
    return f"{name} of step {found.step} in {out}: {how}"


def _run_folder(source: Path, *, is_run: bool) -> Path:
    if not is_run:
        return source.resolve().parent.parent
    return source if (source / CHECKPOINTS).is_dir() else source.resolve().parent


def _config(folder: Path, settings: Sequence[str]) -> RunConfig:
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"{folder} has no config.yaml, which says what model and method its checkpoints are "
            "of; leave the step in RUN/checkpoints, beside the config.yaml of its run"
        )
    for setting in settings:
        if "." not in setting.partition("=")[0]:
            raise ConfigError(
                f"{setting}: the config of a run is frozen; set single keys, such as model.path"
            )
    return read_frozen(folder, list(settings))


def _find(source: Path, folder: Path, which: str, world: World, *, is_run: bool) -> CheckpointInfo:
    if is_run and which == "last":
        found = find_checkpoint(folder, "auto", world)
        if found is None:
            raise ConfigError(f"from={source} has no checkpoint yet")
        return found
    path = source.resolve()
    if is_run:
        best = folder / CHECKPOINTS / BEST
        if not best.is_file():
            raise ConfigError(f"from={source} has no best step: no evaluation has told one")
        path = best.parent / best.read_text(encoding="utf-8").strip()
    found, damage = open_whole(path, world)
    if found is None:
        raise CheckpointError(f"{path} is not whole: {'; '.join(damage)}")
    return found


def _export(config: RunConfig, found: CheckpointInfo, out: Path, world: World) -> str:
    """Put the checkpoint's values into a model, and write that as the end of a run does."""
    _check_base(config, found)
    built = build_trained_model(config, load=True, device=world.device)
    trained = {n: tuple(p.shape) for n, p in built.model.named_parameters() if p.requires_grad}
    check_parameters(found.path, found.manifest.parameters, trained)
    values = CheckpointSource(found)
    weights = weights_of(built, seed=config.seed, start=None)
    saved = RenamedSource(values, lambda name: f"{PARAM}{name}")
    engine = SingleConfig().build(world, config.precision.name)
    over = Weights(weights.held, ChainedSource([saved, weights.added]))
    prepare_engine(engine, built, config, over, config.schedule.warmup_steps + 1)
    _restore_method(built, values)
    tokenizer = load_tokenizer(config.model)
    exporter = Exporter(engine, built.method, weights.held, built.frozen, tokenizer, world)
    exporter.export(out)
    return exporter.name


def _check_base(config: RunConfig, found: CheckpointInfo) -> None:
    base = model_identity(config.model, seed=config.seed)
    if base != found.manifest.identity.model:
        raise ConfigError(
            f"{found.path} is of another base: it was {found.manifest.identity.model!r}, and "
            f"model.path={config.model.path} is {base!r}; set model.path to the base of the run"
        )


@torch.no_grad()
def _restore_method(built: BuiltModel, values: CheckpointSource) -> None:
    """What a method keeps beside parameters, such as the ranks that AdaLoRA has left."""
    if not isinstance(built.method, TakesPartInSteps):
        return
    for name, tensor in built.method.state().items():
        stored = values.read(f"{METHOD}{name}", 0, tensor.numel())
        tensor.copy_(stored.view(tensor.shape))
