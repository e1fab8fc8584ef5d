"""The plan of a run: memory by part, work, traffic and times of one rank, without a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from transformers import PretrainedConfig

from dtune.build import STORAGE, BuiltModel, build_trained_model
from dtune.config.run import RunConfig
from dtune.config.support import accumulation_steps
from dtune.errors import ConfigError
from dtune.measure.cards import Card
from dtune.measure.operations import Operation
from dtune.models.attention import VARLEN
from dtune.models.load import locate
from dtune.models.schema import Attention, ModelConfig
from dtune.parallel.footprint import MASTER, Footprint
from dtune.plan.memory import (
    MemoryPlan,
    MemoryRequest,
    full_batch,
    loss_of,
    mean_length_of,
    plan_held,
    plan_memory,
    planned_of,
    request_of,
)
from dtune.plan.times import Sent, Times, predict, send
from dtune.plan.trace import Tracer
from dtune.resources import resolve_path
from dtune.runtime.schema import Precision
from dtune.train.speed import flops_model
from dtune.types import Batch

_BY_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


class UncountableError(ConfigError):
    """The passes of a model cannot be counted without values."""


@dataclass(frozen=True)
class Content:
    """What is in the rows of an average step, over all ranks."""

    mean_length: float
    """Of documents in tokens, weighted by tokens."""
    tokens: float
    """Without padding."""
    targets: float
    """Tokens that are trained on."""


@dataclass(frozen=True)
class RunPlan:
    """What one optimizer step takes of the fullest rank."""

    memory: MemoryPlan
    ranks: int
    micros: int
    """Micro batches of a step on one rank."""
    slots: int
    """Positions of a step over all ranks, padding included."""
    operations: Mapping[Operation, int]
    """Of one micro batch."""
    tokens: float
    """Of a step over all ranks, without padding."""
    model_flops: float
    """FLOPs of such a token by the formula of MFU: recomputation is not counted."""
    sent: tuple[Sent, ...]
    card: Card | None
    times: Times | None
    """None without a card."""

    @property
    def flops(self) -> int:
        """Of a step on one rank, with what is computed again."""
        return self.micros * sum(one.flops * n for one, n in self.operations.items())

    @property
    def moved(self) -> int:
        """Bytes that the passes of a step read and write at least on one rank."""
        return self.micros * sum(one.moved * n for one, n in self.operations.items())

    @property
    def slots_per_second(self) -> float | None:
        """Predicted over all ranks, padding included; None without a card."""
        return None if self.times is None else self.slots / self.times.step

    @property
    def mfu(self) -> float | None:
        """Predicted share of the cards' peak; None without a card."""
        if self.card is None or self.times is None:
            return None
        peak = self.ranks * self.card.half_flops
        return self.tokens / self.times.step * self.model_flops / peak

    @property
    def fits(self) -> bool | None:
        """Whether the high estimate is within the card's memory; None without a card."""
        return None if self.card is None else self.memory.high <= self.card.memory


class Planner:
    """Plans one model under many settings; building and emptying it happens once.

    Settings may differ in engine, recomputation, offloading and sizes of batches, and in nothing
    else.
    """

    def __init__(
        self,
        run: RunConfig,
        ranks: int,
        card: Card | None,
        *,
        per_node: int = 8,
        device: torch.device | None = None,
    ) -> None:
        """``device`` is where the run computes; without one it is planned for GPUs."""
        self.run, self.ranks, self.card = run, ranks, card
        self.built = build_planned(run, device)
        self._per_node = per_node
        self._loss = loss_of(self.built.method)
        here = self.request(run).device
        self._tracer = Tracer(self.built.model, self.built.spec, here)
        config = self.built.model.config
        if card is not None and here.type == "cpu" and _is_packed_on_gpus(run, config):
            config._attn_implementation = VARLEN

    @property
    def attention(self) -> str:
        """Implementation that is counted, by its name in transformers."""
        return str(self.built.model.config._attn_implementation)

    def with_rows(self, run: RunConfig, rows: int) -> RunConfig:
        """Settings with a micro batch of so many rows, and a step of as many micro batches."""
        micros = accumulation_steps(run, self.ranks)
        train = replace(
            run.train, micro_batch_size=rows, global_batch_size=rows * micros * self.ranks
        )
        return replace(run, train=train)

    def request(self, run: RunConfig) -> MemoryRequest:
        """What decides the memory of settings."""
        accumulates = accumulation_steps(run, self.ranks) > 1
        return request_of(
            run,
            self.built,
            self.ranks,
            accumulates=accumulates,
            for_gpu=self.card is not None,
        )

    def batch(self, run: RunConfig) -> Batch:
        """A micro batch of settings: rows of two documents, every token of which is trained on."""
        return full_batch(run.train.micro_batch_size, run.data.max_length)

    def memory(self, run: RunConfig, batch: Batch | None = None) -> MemoryPlan:
        """Memory under settings; without a batch every token of a full one is trained on."""
        used = batch or self.batch(run)
        model, spec = self.built.model, self.built.spec
        try:
            return plan_memory(
                model, spec, self.request(run), used, self._loss, tracer=self._tracer
            )
        except _BY_VALUES as error:
            raise UncountableError(
                f"{spec.family} ({spec.path}) decides by values what it computes, and cannot be "
                f"planned without them ({error})"
            ) from error
        except RuntimeError as error:
            raise UncountableError(
                f"{spec.family} ({spec.path}) does what torch cannot do on tensors without values, "
                f"and cannot be planned ({error})"
            ) from error

    def held(self, run: RunConfig) -> Footprint:
        """What a rank holds besides activations, under settings."""
        return plan_held(self.built.model, self.built.spec, self.request(run))

    def plan(
        self, run: RunConfig, batch: Batch | None = None, content: Content | None = None
    ) -> RunPlan:
        """Everything under settings; without data steps are full and trained on whole."""
        memory = self.memory(run, batch)
        planned = planned_of(self.built.model, self.built.spec, self.request(run))
        micros = accumulation_steps(run, self.ranks)
        collectives = run.parallel.traffic(planned, micros=micros)
        sent = tuple(send(one, self.card, per_node=self._per_node) for one in collectives)
        width = run.data.max_length if batch is None else batch.input_ids.shape[1]
        slots = run.train.global_batch_size * width
        if content is None:
            full = self.batch(run)
            content = Content(
                mean_length_of(full), slots, slots * full.num_targets / full.num_slots
            )
        flops = flops_model(self.built.matrices, self.built.spec)
        times = None
        if self.card is not None:
            times = predict(
                memory.saved.operations,
                card=self.card,
                micros=micros,
                trained=memory.held.masters // MASTER,
                sent=sent,
                copied=_copied(memory, micros),
            )
        return RunPlan(
            memory=memory,
            ranks=self.ranks,
            micros=micros,
            slots=slots,
            operations=memory.saved.operations,
            tokens=content.tokens,
            model_flops=flops.per_token(
                content.mean_length, targets=content.targets / content.tokens
            ),
            sent=sent,
            card=self.card,
            times=times,
        )


def _is_packed_on_gpus(run: RunConfig, config: PretrainedConfig) -> bool:
    """Whether a GPU would take the variable-length kernel where this machine takes torch's own."""
    is_left = run.model.attention is Attention.auto and run.precision.name is not Precision.fp32
    return is_left and config._attn_implementation == "sdpa"


def _copied(memory: MemoryPlan, micros: int) -> int:
    """Bytes of a step that cross between host and card, in either direction.

    Activations go and come back; parameters in host memory come for forward and for backward of
    each micro batch, and others once, when masters have been stepped there; gradients go once.
    """
    held = memory.held
    computed_with = held.copies or held.masters
    passing = held.frozen + computed_with if "frozen" in held.host else 0
    once = 0 if passing or not held.host else computed_with
    gradients = held.gradients if "gradients" in held.host else 0
    return 2 * micros * (memory.saved.offloaded + passing) + once + gradients


def plan_run(run: RunConfig, world_size: int, card: Card | None) -> RunPlan:
    """Plan a composed run on so many ranks, with full batches."""
    return Planner(run, world_size, card).plan(run)


def build_planned(run: RunConfig, device: torch.device | None = None) -> BuiltModel:
    """The run's model on the meta device with its method in place; ``device``: see ``Planner``."""
    found = replace(run, model=reachable(run.model))
    built = build_trained_model(found, load=False, device=device)
    built.quantizer.cache(built.model, STORAGE[run.precision.name])
    return built


def reachable(model: ModelConfig) -> ModelConfig:
    """The model itself, or its architecture as embedded where the Hub is out of reach."""
    try:
        locate(model.path, key="model.path", revision=model.revision)
    except ConfigError:
        folder = Path(resolve_path("dtune://architectures")) / model.path.replace("/", "--")
        if not folder.is_dir():
            raise
        return replace(model, path=str(folder))
    return model
