"""The pieces that ``assemble`` puts together: model with method, data, held-out rows, engine."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dtune.config.run import RunConfig
from dtune.config.support import check_attention
from dtune.data.dataset import TokenDataset
from dtune.data.loader import Loader
from dtune.data.prompts import Prompt, read_prompts
from dtune.data.tokenize import prepare_dataset
from dtune.evaluate.heldout import HeldOut
from dtune.measure.flops import MatrixCounts
from dtune.models.attention import attention_in_words
from dtune.models.load import build_model, open_weights, quantized_by_files
from dtune.models.sources import ChainedSource, RenamedSource
from dtune.objectives.fingerprint import objective_fingerprint
from dtune.optim.schedules import build_schedule
from dtune.patch.apply import apply_patches, choose_patches
from dtune.patch.base import PatchRow
from dtune.patch.schema import Backend
from dtune.peft.tokens import check_trained
from dtune.quant.stored import (
    check_stored_base,
    check_stored_linears,
    check_stored_settings,
    with_stored_floats,
)
from dtune.runtime.logs import log
from dtune.runtime.schema import Precision
from dtune.runtime.world import World
from dtune.train.speed import count_matrices
from dtune.types import (
    Engine,
    InjectReport,
    ModelSpec,
    Objective,
    PeftMethod,
    Quantizer,
    TensorSource,
)

STORAGE = {
    Precision.fp32: torch.float32,
    Precision.bf16: torch.bfloat16,
    Precision.fp16: torch.float16,
}
"""Dtype that frozen weights are stored in."""


@dataclass(frozen=True)
class BuiltModel:
    """A model on the meta device with its method in place."""

    model: PreTrainedModel
    spec: ModelSpec
    method: PeftMethod
    quantizer: Quantizer
    stored: TensorSource | None
    """The base checkpoint, by its names; None where weights are not to be loaded."""
    report: InjectReport
    quantized: Mapping[str, int]
    """Type of quantised linear -> how often."""
    frozen: Mapping[str, tuple[int, ...]]
    """Shapes of the parameters that are not trained, as they were before quantisation."""
    matrices: MatrixCounts
    patches: list[PatchRow]


@dataclass(frozen=True)
class Weights:
    """Where the values of a built model come from, by its parameters' names."""

    held: TensorSource
    """The frozen base, and the first values of what of it is trained."""
    added: TensorSource
    """What the method added."""


def build_trained_model(
    run: RunConfig, *, load: bool, device: torch.device | None = None
) -> BuiltModel:
    """Model -> method -> quantisation of what is frozen -> patches, on the meta device.

    No weight is read. With ``load`` the files of the weights are found and checked. ``device`` is
    where it will compute; without one the patches are those of a device that can run them all.
    """
    kernels = choose_patches(run.kernels, device)
    dtype = STORAGE[run.precision.name]
    model, spec = build_model(run.model, dtype=dtype)
    stored = open_weights(run.model, model, spec, seed=run.seed) if load else None
    if stored is not None:
        spec = quantized_by_files(stored, spec)
    check_stored_settings(run.quant, spec)
    method = run.peft.build()
    # What auto has chosen is known only now.
    check_attention(run, str(model.config._attn_implementation))
    report = method.inject(model, spec)
    check_trained(model, spec, peft=run.peft.name)
    frozen = {n: tuple(p.shape) for n, p in model.named_parameters() if not p.requires_grad}
    matrices = count_matrices(model, spec)
    quant = with_stored_floats(run.quant, spec)
    where = device or torch.device("cpu")
    quantizer = quant.build(where)
    quantized = quantizer.quantize(model, spec, method.stored_name)
    check_stored_linears(model, spec, method.stored_name)
    required = run.kernels.name is not Backend.auto
    patches = apply_patches(model, kernels, spec, required=required)
    log.info(
        "%s: %s of %s parameters trained",
        report.method,
        f"{report.trainable:,}",
        f"{report.total:,}",
    )
    log.info("attention: %s", attention_in_words(model, where, dtype))
    for name, count in quantized.items():
        log.info("quant=%s: %d x %s", run.quant.name, count, name)
    for row in patches:
        log.info("kernels: %s", row)
    if kernels and not patches:
        log.info("kernels: nothing of %s (%s) is known to them", spec.family, spec.path)
    return BuiltModel(
        model, spec, method, quantizer, stored, report, quantized, frozen, matrices, patches
    )


def weights_of(built: BuiltModel, *, seed: int, start: Path | None) -> Weights:
    """Where the values come from; ``start``: exported weights of such a method to begin with.

    ConfigError where ``start`` does not fit. Reads no values.
    """
    assert built.stored is not None, "the model was built without its weights"
    method = built.method
    stored = RenamedSource(built.stored, method.stored_name)
    base = method.base(stored)
    check_stored_base(built.spec, changed=base is not stored)
    held = built.quantizer.source(base)
    added = method.source(stored, held, seed)
    if start is not None:
        added = ChainedSource([method.saved(str(start)), added])
    return Weights(held, added)


def prepare_engine(
    engine: Engine, built: BuiltModel, run: RunConfig, weights: Weights, total_steps: int
) -> None:
    """Recompute -> compile -> shard -> load -> optimizer -> what is kept dequantised."""
    engine.prepare(
        built.model,
        built.spec,
        source=ChainedSource([weights.added, weights.held]),
        optimizer=partial(run.optim.build, rate_factor=built.method.rate_factor),
        schedule=lambda optimizer: build_schedule(run.schedule, optimizer, total_steps),
        recompute=run.train.recompute,
        compile_blocks=run.train.compile,
        offload=run.train.offload_activations,
    )
    built.quantizer.cache(built.model, STORAGE[run.precision.name])


@dataclass(frozen=True)
class RunData:
    """Tokenised data and the steps that follow from them."""

    objective: Objective
    train: TokenDataset
    loader: Loader
    total_steps: int


def build_data(
    run: RunConfig, tokenizer: PreTrainedTokenizerBase, world: World, *, world_size: int
) -> RunData:
    """Rows -> objective -> tokens (kept on disk) -> batches, for one of ``world_size`` ranks."""
    objective = run.objective.build(tokenizer)
    dataset = prepare_dataset(
        run.data,
        objective,
        which="train",
        fingerprint=objective_fingerprint(run.objective, tokenizer),
        world=world,
    )
    loader = Loader(
        dataset,
        run.data,
        micro_batch_size=run.train.micro_batch_size,
        global_batch_size=run.train.global_batch_size,
        seed=run.seed,
        rank=world.rank,
        world_size=world_size,
        pad_token_id=padding_token(tokenizer),
        epochs=0.0 if run.train.max_steps else run.train.epochs,
    )
    total_steps = run.train.max_steps or loader.steps_for(run.train.epochs)
    return RunData(objective, dataset, loader, total_steps)


def build_held_out(
    run: RunConfig, tokenizer: PreTrainedTokenizerBase, objective: Objective, world: World
) -> HeldOut | None:
    """What is measured on data.eval_path; None where there are no held-out rows."""
    if run.data.eval_path == "none":
        return None
    dataset = prepare_dataset(
        run.data,
        objective,
        which="eval",
        fingerprint=objective_fingerprint(run.objective, tokenizer),
        world=world,
    )
    micro = run.train.micro_batch_size
    loader = Loader(
        dataset,
        run.data,
        micro_batch_size=micro,
        global_batch_size=micro * world.size,
        seed=run.seed,
        rank=world.rank,
        world_size=world.size,
        pad_token_id=padding_token(tokenizer),
        epochs=1.0,
        shuffle=False,
    )
    prompts: tuple[Prompt, ...] = ()
    if run.evaluate.generate:
        prompts = read_prompts(run.data, objective, max_rows=run.evaluate.max_rows)
    return HeldOut(objective, loader, prompts, tokenizer, run.evaluate, world)


def list_left_out(
    run_dir: Path, world: World, train: TokenDataset, held_out: HeldOut | None
) -> None:
    """Put the rows that are not trained or measured on into the run folder, a file for each part.

    ``RUN/left_out-train.jsonl``: a line for each, with the place that it came from and the reason.
    """
    parts = {"train": train} if held_out is None else {"train": train, "eval": held_out.dataset}
    for which, dataset in parts.items():
        listed = run_dir / f"left_out-{which}.jsonl"
        if world.is_first and dataset.left_out.stat().st_size:
            shutil.copyfile(dataset.left_out, listed)
            log.info("%s data: rows left out are listed in %s", which, listed)


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id that fills rows up; never attended to or trained on, so any id serves."""
    return int(tokenizer.pad_token_id or 0)
