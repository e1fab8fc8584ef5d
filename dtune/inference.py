"""From a config to what uses trained weights: evaluation, answers, a merged model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dtune.build import (
    STORAGE,
    BuiltModel,
    build_held_out,
    build_trained_model,
    prepare_engine,
    weights_of,
)
from dtune.config.identity import model_identity
from dtune.config.run import RunConfig
from dtune.data.tokenize import Part
from dtune.errors import ConfigError
from dtune.evaluate.adapter_files import AdapterFiles
from dtune.evaluate.adapters import NamedAdapters, check_fits
from dtune.evaluate.compare import TEXT
from dtune.evaluate.heldout import HeldOut
from dtune.evaluate.speaker import Speaker
from dtune.models.load import build_model, load_tokenizer
from dtune.models.schema import ModelConfig
from dtune.models.sources import RenamedSource
from dtune.parallel.ranges import fill_buffers
from dtune.parallel.replica import allocate
from dtune.parallel.schema.single import SingleConfig
from dtune.peft.export import base_name, stored_path
from dtune.runtime.world import World
from dtune.types import Engine, Example, Objective, Row


@dataclass(frozen=True)
class Inference:
    """What trained weights are used with, before any of them is read."""

    run: RunConfig
    tokenizer: PreTrainedTokenizerBase
    objective: Objective
    built: BuiltModel

    @property
    def max_positions(self) -> int:
        """Longest sequence that the architecture names; 0 where it names none."""
        config = self.built.spec.config.get_text_config().to_dict()
        return int(config.get("max_position_embeddings") or 0)

    def load(self, world: World, exported: Path | None) -> Engine:
        """An engine with exported weights; None: the base, which every method starts at."""
        run, built = self.run, self.built
        weights = weights_of(built, seed=run.seed, start=exported or run.peft.start)
        engine = SingleConfig().build(world, run.precision.name)
        prepare_engine(engine, built, run, weights, total_steps=run.schedule.warmup_steps + 1)
        return engine


def assemble_inference(run: RunConfig, world: World) -> Inference:
    """Tokenizer, objective and model with its method, on the meta device."""
    tokenizer = load_tokenizer(run.model)
    built = build_trained_model(run, load=True, device=world.device)
    return Inference(run, tokenizer, run.objective.build(tokenizer), built)


def assemble_evaluation(
    run: RunConfig, world: World, exported: Path | None
) -> tuple[Engine, HeldOut]:
    """Build what evaluates exported weights; None: the base, which every method starts at."""
    parts = assemble_inference(run, world)
    held_out = build_held_out(run, parts.tokenizer, parts.objective, world)
    assert held_out is not None, "data.eval_path was checked"
    return parts.load(world, exported), held_out


def assemble_speaker(
    parts: Inference,
    world: World,
    exported: Path | None,
    adapters: Mapping[str, AdapterFiles],
    *,
    first: str,
) -> Speaker:
    """What answers: the trained weights, or ``adapters`` on the base beginning with ``first``."""
    precision = parts.run.precision.name
    if not adapters:
        engine = parts.load(world, exported)
        return Speaker(engine.module, parts.tokenizer, world.device, engine.compute)
    base = load_float_base(parts, dtype=STORAGE[precision], device=world.device)
    assert isinstance(base, PreTrainedModel), type(base)
    compute = SingleConfig().build(world, precision).compute
    speaker = Speaker(base, parts.tokenizer, world.device, compute, NamedAdapters(base, adapters))
    speaker.use(first)
    return speaker


def check_adapters(
    run: RunConfig, adapters: Mapping[str, AdapterFiles], *, same_base: bool = True
) -> None:
    """Raise ConfigError for an adapter that does not belong to the base; reads no weights."""
    base, _ = build_model(run.model, dtype=STORAGE[run.precision.name])
    for files in adapters.values():
        check_fits(files, base)
        if same_base:
            _check_base(files, run.model)


def _check_base(files: AdapterFiles, model: ModelConfig) -> None:
    """Compare the base that an adapter names: by its files where they are here, else by name."""
    ours = stored_path(model.path)
    if not files.base or files.base == ours:
        return
    if (Path(files.base) / "config.json").is_file():
        try:
            theirs = model_identity(ModelConfig(path=files.base), seed=0)
        except OSError:
            theirs = ""
        if theirs == model_identity(model, seed=0):
            return
    elif base_name(files.base).lower() == base_name(ours).lower():
        return
    raise ConfigError(
        f"{files.key}={files.folder} was trained on {files.base}, not on model.path={model.path}; "
        "set model.path to its base, or check_base=false if the two are the same"
    )


@torch.no_grad()
def load_float_base(parts: Inference, *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The base alone, without a method or quantiser, with the weights that were trained against.

    Where the run quantises, those of the quantised linears are the dequantised ones: it is them
    that the adapter was fitted to. What a method takes out of the base and adds back (PiSSA) is in
    it as ever, and so are the first values of what the adapter replaces.
    """
    built = parts.built
    assert built.stored is not None
    model, _ = build_model(parts.run.model, dtype=dtype, device=device)
    allocate(model, device)
    held = weights_of(built, seed=parts.run.seed, start=None).held
    stored = RenamedSource(built.stored, built.method.stored_name)
    kept = built.method.base(stored)
    injected = {built.method.stored_name(name): name for name in built.frozen}
    for stored_name, parameter in model.named_parameters():
        count = parameter.numel()
        if stored_name in injected:
            name = injected[stored_name]
            values = held.read(name, 0, count).float().cpu()
            if kept is not stored:
                taken = stored.read(name, 0, count).float() - kept.read(name, 0, count).float()
                values = values + taken
        else:
            values = built.stored.read(stored_name, 0, count)
        parameter.copy_(values.view(parameter.shape))
        parameter.requires_grad_(False)
    fill_buffers(model, built.stored)
    model.eval()
    return model


def rows_to_compare(parts: Inference, count: int) -> list[Example]:
    """The first held-out rows as they are trained on; a built-in text where there are none.

    New tokens come in a row of their own, because the others may hold none of them.
    """
    run, objective = parts.run, parts.objective
    text: list[int] = parts.tokenizer(TEXT)["input_ids"]
    new = list(parts.built.spec.added_tokens)
    further = [Example(0, [*new, *text[:1]], [*new, *text[:1]])] if new else []
    if run.data.eval_path == "none":
        return [Example(0, text, list(text)), *further]
    part = Part.of(run.data, "eval")
    rows = (row for _, row in part.parse(part.open()) if isinstance(row, Row))
    examples = [objective.render(row) for row in islice(rows, count)]
    if not examples:
        raise ConfigError(f"data.eval_path={run.data.eval_path} holds no row to compare on")
    return [*examples, *further]
