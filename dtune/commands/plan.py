"""``dtune plan``: what a run would do, without loading weights."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dtune_launch.gpus import resolve_nproc

from dtune.config.compose import compose
from dtune.config.freeze import load_frozen
from dtune.config.run import RunConfig
from dtune.config.support import accumulation_steps, check_run
from dtune.errors import ConfigError
from dtune.models.schema import ModelConfig
from dtune.resources import resolve_path

if TYPE_CHECKING:
    from dtune.build import BuiltModel
    from dtune.types import Batch

Rows = list[tuple[str, str]]


def run(argv: list[str]) -> int:
    """Print the resolved config and the numbers that follow from it."""
    text = compose("train", argv)
    if text is None:
        return 0
    config = load_frozen(text)
    nproc = resolve_nproc(config.launch, engine=config.parallel.name)
    world_size = nproc * config.launch.num_nodes
    check_run(config, world_size)
    built = _build(config)
    data, batch = _data_rows(config, world_size)
    rows = [
        *_batch_rows(config, world_size),
        *_model_rows(config, built),
        *data,
        *_memory_rows(config, built, world_size, batch),
    ]
    width = max(len(name) for name, _ in rows)
    sys.stdout.write(text + "\n")
    sys.stdout.writelines(f"{name:<{width}}  {value}\n" for name, value in rows)
    return 0


def _batch_rows(run: RunConfig, world_size: int) -> Rows:
    accumulation = accumulation_steps(run, world_size)
    train = run.train
    return [
        ("processes", f"{world_size} ({run.parallel.name})"),
        (
            "global batch",
            f"{train.global_batch_size} = {train.micro_batch_size} micro x {accumulation} "
            f"accumulated x {world_size} ranks",
        ),
    ]


def _build(run: RunConfig) -> BuiltModel:
    from dtune.build import build_trained_model

    return build_trained_model(dataclasses.replace(run, model=_reachable(run.model)), load=False)


def _model_rows(run: RunConfig, built: BuiltModel) -> Rows:
    report, spec = built.report, built.spec
    share = report.trainable / report.total
    return [
        ("model", f"{run.model.path} ({spec.family}), {spec.num_parameters:,} parameters"),
        ("trained", f"{report.trainable:,} of {report.total:,} ({share:.3%})"),
        *[("replaced", f"{count} x {name}") for name, count in report.replaced.items()],
        ("kernels", _kernels(run, patched=bool(built.patches))),
        *[("patch", str(row)) for row in built.patches],
    ]


def _memory_rows(run: RunConfig, built: BuiltModel, world_size: int, batch: Batch | None) -> Rows:
    """What the fullest rank holds; turns the built model into tensors without values."""
    from dtune.plan_memory import memory_rows

    return memory_rows(
        run, built, batch, world_size, accumulates=accumulation_steps(run, world_size) > 1
    )


def _kernels(run: RunConfig, *, patched: bool) -> str:
    """The option, and whether what is planned could run here."""
    from dtune.patch.apply import why_not_here

    name = run.kernels.name.value
    if not patched:
        return f"{name}: no patches"
    problem = why_not_here(run.kernels)
    return f"{name}, planned for another machine: {problem}" if problem else name


def _reachable(model: ModelConfig) -> ModelConfig:
    """The model itself, or its architecture as embedded where the Hub is out of reach."""
    from dtune.models.load import locate

    try:
        locate(model.path, key="model.path", revision=model.revision)
    except ConfigError:
        folder = Path(resolve_path("dtune://architectures")) / model.path.replace("/", "--")
        if not folder.is_dir():
            raise
        return dataclasses.replace(model, path=str(folder))
    return model


def _data_rows(run: RunConfig, world_size: int) -> tuple[Rows, Batch | None]:
    """Rows about the data, and the micro batch of the first step that trains most tokens."""
    from dtune.build import build_data
    from dtune.models.load import load_tokenizer
    from dtune.runtime.world import World

    try:
        tokenizer = load_tokenizer(run.model)
    except ConfigError as error:
        steps = str(run.train.max_steps) if run.train.max_steps else "known once data are tokenised"
        return [("steps", steps), ("data", f"not tokenised: {error}")], None
    world = World.start()
    data = build_data(run, tokenizer, world, world_size=world_size)
    report, per_step = data.train.report, run.train.global_batch_size
    sequences = data.loader.sequences_per_epoch
    # The last step may be part empty.
    epochs = data.loader.sequences_until(data.total_steps) / sequences
    kind = f"packed sequences of {run.data.max_length}" if run.data.packing else "padded rows"
    batch = max(data.loader.batches(0), key=lambda batch: batch.num_targets)
    world.stop()
    rows = [
        *[("data", line) for line in report.lines()],
        ("sequences", f"{sequences:,} {kind} an epoch"),
        ("steps", f"{data.total_steps:,} of {per_step} sequences = {epochs:.2f} epochs"),
        (
            "tokens",
            f"{round(report.tokens * epochs):,}, {round(report.trained_tokens * epochs):,} trained",
        ),
    ]
    return rows, batch
