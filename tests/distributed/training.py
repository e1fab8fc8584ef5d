"""Cases that train a small model under one engine, run by every rank of a pool.

Rows are drawn by index, so that one process and many see the same global batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dtune.models.load import build_model, open_weights
from dtune.models.schema import Attention, Init, ModelConfig
from dtune.models.sources import ChainedSource, RenamedSource
from dtune.objectives.causal import causal_loss
from dtune.optim.schedules import build_schedule
from dtune.optim.schema import OPTIM, OptimConfig
from dtune.optim.schema.schedule import ScheduleConfig, Shape
from dtune.parallel.base import COMPUTE_DTYPES
from dtune.parallel.schema import PARALLEL
from dtune.patch.apply import apply_patches
from dtune.patch.base import patch_names
from dtune.peft.schema import PEFT
from dtune.quant.schema import QUANT
from dtune.runtime.schema import Precision, Recompute
from dtune.runtime.world import World
from dtune.train.participant import WithMethod
from dtune.types import (
    IGNORE_INDEX,
    Batch,
    Engine,
    FlatShard,
    PeftMethod,
    TakesPartInSteps,
    TensorSource,
)

VOCABULARY = 128
LENGTH = 24


@dataclass(frozen=True)
class Setup:
    """What to train and how. Picklable, so that it travels to the ranks."""

    model: str
    """Folder with a config.json, and with weights unless ``random_weights``."""
    engine: str = "single"
    engine_options: tuple[tuple[str, Any], ...] = ()
    peft: str = "full"
    peft_options: tuple[tuple[str, Any], ...] = ()
    quant: str = "none"
    quant_options: tuple[tuple[str, Any], ...] = ()
    precision: str = "fp32"
    steps: int = 20
    micros: int = 2
    """Micro batches of one step over all ranks."""
    packed: bool = False
    optim: str = "adamw"
    optim_options: tuple[tuple[str, Any], ...] = ()
    lr: float = 3e-3
    max_norm: float = 1.0
    recompute: str = "none"
    compile_blocks: bool = False
    offload: bool = False
    random_weights: bool = False
    kernels: bool = False
    """Whether every patch is applied; the kernels compute by their references."""
    grad_scale_error: float = 1.0
    """Factor on the engine's grad_scale; anything but 1 must be noticed."""

    def alone(self) -> Setup:
        """The same in one process, as it is right."""
        return replace(self, engine="single", engine_options=(), grad_scale_error=1.0)


def _document(generator: torch.Generator, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of one document: its first third is not trained on."""
    length = int(torch.randint(3, longest + 1, (), generator=generator))
    ids = torch.randint(4, VOCABULARY, (length,), generator=generator)
    labels = ids.clone()
    labels[: max(1, length // 3)] = IGNORE_INDEX
    return ids, labels


def make_batch(step: int, micro: int, *, packed: bool, rows: int = 2) -> Batch:
    """Micro batch ``micro`` of a step: two rows of documents of very different lengths."""
    generator = torch.Generator().manual_seed(1000 * step + micro)
    shape = (rows, LENGTH)
    ids = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORE_INDEX)
    positions = torch.zeros(shape, dtype=torch.long)
    documents = torch.full(shape, -1)
    for row in range(rows):
        at = number = 0
        # Later micro batches are emptier, so that ranks differ in tokens.
        room = max(6, LENGTH - 4 * micro)
        while at == 0 or (packed and room - at >= 3):
            one_ids, one_labels = _document(generator, room - at)
            span = slice(at, at + len(one_ids))
            ids[row, span], labels[row, span] = one_ids, one_labels
            positions[row, span] = torch.arange(len(one_ids))
            documents[row, span] = number
            at, number = at + len(one_ids), number + 1
    mask = (documents >= 0).long()
    targets = int((labels[:, 1:] != IGNORE_INDEX).sum())
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=positions if packed else torch.arange(LENGTH).expand(shape).contiguous(),
        document_ids=documents,
        attention_mask=None if packed else mask,
        rows=tuple((row,) for row in range(rows)),
        num_tokens=int(mask.sum()),
        num_targets=targets,
    )


@dataclass(frozen=True)
class Built:
    """A prepared engine, and what its weights are exported with."""

    engine: Engine
    method: PeftMethod
    stored: TensorSource
    held: TensorSource
    frozen: dict[str, tuple[int, ...]]
    """Shapes of what is not trained, before quantisation."""

    @property
    def participant(self) -> TakesPartInSteps | None:
        """The method, where it takes part in steps."""
        return self.method if isinstance(self.method, TakesPartInSteps) else None


def build_engine(world: World, setup: Setup) -> Engine:
    """A prepared engine; ``single`` runs by itself on whichever rank builds it."""
    return build(world, setup).engine


def build(world: World, setup: Setup, *, saved: Path | None = None) -> Built:
    """The same with what belongs to it; ``saved``: exported weights of the method to start with."""
    torch.manual_seed(0)
    if setup.engine == "single":
        world = replace(world, rank=0, size=1)
    precision = Precision(setup.precision)
    config = ModelConfig(
        path=setup.model,
        attention=Attention.sdpa,
        init=Init.random if setup.random_weights else Init.pretrained,
    )
    model, spec = build_model(config, dtype=COMPUTE_DTYPES[precision], device=world.device)
    weights = open_weights(config, model, spec, seed=1)
    method = PEFT.config(setup.peft)(**dict(setup.peft_options)).build()
    method.inject(model, spec)
    frozen = {n: tuple(p.shape) for n, p in model.named_parameters() if not p.requires_grad}
    quantizer = QUANT.config(setup.quant)(**dict(setup.quant_options)).build(world.device)
    quantizer.quantize(model, spec, method.stored_name)
    if setup.kernels:
        apply_patches(model, patch_names(), spec)
    stored = RenamedSource(weights, method.stored_name)
    held = quantizer.source(method.base(stored))
    first = [] if saved is None else [method.saved(str(saved))]
    source = ChainedSource([*first, method.source(stored, held, 2), held])
    engine = PARALLEL.config(setup.engine)(**dict(setup.engine_options)).build(world, precision)
    schedule = ScheduleConfig(name=Shape.cosine, warmup_steps=2, min_factor=0.1)
    engine.prepare(
        model,
        spec,
        source=source,
        optimizer=partial(_optim(setup).build, rate_factor=method.rate_factor),
        schedule=partial(build_schedule_of, schedule),
        recompute=Recompute(setup.recompute),
        compile_blocks=setup.compile_blocks,
        offload=setup.offload,
    )
    engine.model.train()
    return Built(engine, method, stored, held, frozen)


def _optim(setup: Setup) -> OptimConfig:
    options = dict(setup.optim_options)
    return OPTIM.config(setup.optim)(lr=setup.lr, weight_decay=0.1, **options)


def build_schedule_of(config: ScheduleConfig, optimizer: torch.optim.Optimizer) -> Any:
    """A schedule of 30 steps, whatever the test runs of them."""
    return build_schedule(config, optimizer, 30)


def train(
    world: World,
    engine: Engine,
    setup: Setup,
    steps: range,
    participant: TakesPartInSteps | None = None,
) -> list[tuple[float, float]]:
    """Loss (over all ranks) and gradient norm of each step."""
    alone = setup.engine == "single"
    rank, size = (0, 1) if alone else (world.rank, world.size)
    assert setup.micros % size == 0
    each = setup.micros // size
    curve = []
    for step in steps:
        batches = [make_batch(step, m, packed=setup.packed) for m in range(setup.micros)]
        weight = sum(batch.num_targets for batch in batches)
        total = torch.zeros((), device=world.device)
        mine = batches[rank * each : (rank + 1) * each]
        for number, batch in enumerate(mine):
            with engine.micro(last=number == each - 1):
                loss = causal_loss(engine.model, batch.to(world.device)).total / weight
                total += loss.detach()
                if participant is not None and number == each - 1:
                    loss = loss + participant.penalty() / size
                engine.backward(loss * engine.grad_scale * setup.grad_scale_error)
        norm = engine.clip(setup.max_norm)
        if participant is not None:
            participant.before_step()
        engine.step()
        if participant is not None:
            participant.after_step(step + 1, setup.steps)
        total = total if alone else world.sum(total)
        curve.append((total.item(), norm.item()))
    return curve


def curve(world: World, *, setup: Setup) -> list[tuple[float, float]]:
    """Train from the start; nothing on the ranks that have no part in it."""
    if setup.engine == "single" and not world.is_first:
        return []
    return train(world, build_engine(world, setup), setup, range(setup.steps))


class StateSource:
    """The state of an engine as it was, copied: what a checkpoint gives back."""

    def __init__(self, shards: list[FlatShard]) -> None:
        self._shards = {s.name: replace(s, local=s.local.detach().clone()) for s in shards}

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._shards[name].shape

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements of the range that this rank had."""
        shard = self._shards[name]
        assert shard.start <= start <= stop <= shard.stop
        return shard.local[start - shard.start : stop - shard.start]


def copied(world: World, built: Built) -> tuple[StateSource, dict[str, float | int]]:
    """What a checkpoint taken now gives back."""
    state = WithMethod(built.engine, built.participant, world).state()
    return StateSource(state.shards), dict(state.scalars)


def put_back(world: World, built: Built, state: tuple[StateSource, dict[str, float | int]]) -> None:
    """Go on from what ``copied`` took."""
    source, scalars = state
    WithMethod(built.engine, built.participant, world).load_state(source, scalars)


def _tensors(engine: Engine) -> dict[str, torch.Tensor]:
    """What ``full_tensors`` gives this rank. Runs through all of it: it is collective."""
    return {name: tensor for name, tensor in engine.full_tensors() if tensor is not None}


def whole_without_other_ranks(world: World, *, setup: Setup) -> dict[str, int]:
    """Trained parameters, and how many of them this rank gives whole, with no collective."""
    engine = build_engine(world, setup)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "reduce", refuse)
        whole = len(_tensors(engine))
    parameters = sum(p.requires_grad for p in engine.module.parameters())
    return {"parameters": parameters, "whole": whole}


def resume(world: World, *, setup: Setup, at: int) -> dict[str, Any]:
    """Train through, and again from the state at a step in a new engine."""
    engine = build_engine(world, setup)
    train(world, engine, setup, range(at))
    state = engine.state()
    source, scalars = StateSource(state.shards), dict(state.scalars)
    uninterrupted = train(world, engine, setup, range(at, setup.steps))
    through = _tensors(engine)
    again = build_engine(world, setup)
    again.load_state(source, scalars)
    resumed = train(world, again, setup, range(at, setup.steps))
    then = _tensors(again)
    return {
        "uninterrupted": uninterrupted,
        "resumed": resumed,
        "equal_weights": all(torch.equal(through[n], t) for n, t in then.items()),
        "tensors": len(through),
        "skipped": again.skipped_steps,
    }


def first_state(world: World, *, setup: Setup) -> dict[str, Any]:
    """The ranges that each rank holds before any step, and the loaded tensors whole."""
    engine = build_engine(world, setup)
    state = engine.state()
    ranges = [(s.name, s.shape, s.start, s.stop, s.saved_here) for s in state.shards]
    return {"ranges": ranges, "scalars": state.scalars, "tensors": _tensors(engine)}


def config_folder(folder: Path, *, blocks: int = 2, hidden: int = 64) -> Path:
    """Write the config of a Llama of a few small blocks with an odd vocabulary."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=VOCABULARY + 1,
        hidden_size=hidden,
        intermediate_size=hidden * 3 // 2,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.2,
    ).save_pretrained(folder)
    return folder


def fp16_curve(world: World, *, setup: Setup, first_scale: float) -> dict[str, Any]:
    """Train in fp16 from a loss scale."""
    with pytest.MonkeyPatch.context() as patch:
        if setup.engine.startswith("zero"):
            from deepspeed.accelerator import get_accelerator

            patch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
        engine = build_engine(world, setup)
        state = engine.state()
        scalars = {**state.scalars, "loss_scale": first_scale}
        engine.load_state(StateSource(state.shards), scalars)
        points = train(world, engine, setup, range(setup.steps))
    after = engine.state().scalars
    return {
        "curve": points,
        "overflows": sum(not math.isfinite(norm) for _, norm in points),
        "skipped": engine.skipped_steps,
        "scale": after["loss_scale"],
        "optimizer_step": after["optimizer_step"],
        "schedule_position": after["schedule_position"],
    }
