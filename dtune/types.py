"""The seams: what components hand to each other. Components import this, never each other.

Shape legend: B rows of a micro batch, S token positions of a row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from dtune.runtime.schema import Recompute

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from transformers import PretrainedConfig

IGNORE_INDEX = -100
"""Label of a position that is not trained on."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """One row of data in canonical form: a conversation, or plain text."""

    index: int
    origin: str
    """Where it came from, for reports: ``file.jsonl:17``."""
    messages: tuple[Message, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Example:
    """One rendered row: token ids, and for each token its label or IGNORE_INDEX (unshifted)."""

    row: int
    input_ids: list[int]
    labels: list[int]

    @property
    def num_targets(self) -> int:
        """Tokens that a causal model is trained to predict: labels after the first position."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass(frozen=True)
class Batch:
    """One micro batch. Tensors are int64 [B, S] unless said otherwise.

    ``labels`` are unshifted: the label of a token is its own id, or IGNORE_INDEX, also at the
    first token of every document. ``position_ids`` restart at 0 with every document.
    ``document_ids`` number the documents of a row from 0 and are -1 on padding: a token sees only
    tokens of its own document. ``attention_mask`` is 1 on tokens and 0 on padding, or None for
    packed rows, where position ids carry the bounds.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    rows: tuple[tuple[int, ...], ...]
    """Indices of the data rows that each batch row holds, for reports."""
    num_tokens: int
    """Tokens that are not padding."""
    num_targets: int
    """Positions that are trained on."""
    num_documents: int = -1
    """Stretches of positions that go on by one within padding or outside of it, over all rows;
    counted here where it is not given."""

    def __post_init__(self) -> None:
        if self.num_documents < 0:
            breaks = self.position_ids.diff(dim=1) != 1
            if self.attention_mask is not None:
                breaks |= self.attention_mask.diff(dim=1) != 0
            count = int(breaks.sum()) + self.position_ids.shape[0]
            object.__setattr__(self, "num_documents", count)

    @property
    def num_slots(self) -> int:
        """Positions computed, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> Batch:
        """Copy every tensor to the device, without waiting for the copy."""
        mask = self.attention_mask
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            document_ids=self.document_ids.to(device, non_blocking=True),
            attention_mask=None if mask is None else mask.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class LossParts:
    """A loss as a sum and its weight, so that the trainer normalises over the whole step."""

    total: torch.Tensor
    """Sum over trained tokens, fp32 scalar with gradient."""
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Further sums by name, detached fp32 scalars, divided by the same weight when logged."""


class Role(Enum):
    """What a linear layer is for."""

    attention = "attention"
    mlp = "mlp"
    head = "head"
    other = "other"


@dataclass(frozen=True)
class ModelSpec:
    """Facts about a built model that components need instead of its class."""

    family: str
    """``model_type`` of the Hugging Face config."""
    path: str
    """Where it was loaded from, as the user wrote it."""
    config: PretrainedConfig
    block_types: tuple[type[nn.Module], ...]
    """Classes of the repeated decoder blocks: units of recomputation, compilation and sharding."""
    linears: Mapping[str, Role]
    """Dotted path of every linear layer, in module order."""
    tied: Mapping[str, str]
    """Parameter name -> the name it shares storage with and is stored under."""

    buffers: tuple[str, ...] = ()
    """Buffers that are stored with the parameters: loaded and exported like them, never trained."""
    num_parameters: int = 0
    stored_dtype: torch.dtype | None = None
    """Dtype of the weights in the base's files; None: that of ``config``."""


class Objective(Protocol):
    """What a row becomes, and what the loss is."""

    def render(self, row: Row) -> Example:
        """Tokens and labels of one row, uncut. DataError names the row that cannot be rendered."""
        ...

    def prompt(self, row: Row) -> tuple[list[int], str] | None:
        """Token ids to generate from, and the expected answer; None without a question."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> LossParts:
        """Forward and loss of one micro batch; its weight is ``batch.num_targets``."""
        ...


class TensorSource(Protocol):
    """Where the values of named tensors come from: files, a checkpoint, an initialiser."""

    def __contains__(self, name: str) -> bool:
        """Whether the tensor can be read."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        ...

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the row-major flattened tensor: 1-D, CPU, dtype as stored."""
        ...


@dataclass(frozen=True)
class FlatShard:
    """The contiguous flat range of one named tensor that this rank holds.

    FSDP2's dim-0 shard, ZeRO's partition and a replica are all such ranges, so that loading,
    saving and resuming are one piece of code for every engine.
    """

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    local: torch.Tensor
    """1-D view of the storage that the engine uses; writing to it sets the value. May be empty."""
    saved_here: bool = True
    """False where another rank saves the same range (replicas)."""

    @property
    def stop(self) -> int:
        """End of the range, exclusive."""
        return self.start + self.local.numel()


@dataclass(frozen=True)
class EngineState:
    """What an engine must have back to go on: ranges of tensors, and small facts equal on ranks.

    Shard names are ``param/<parameter>`` for masters and ``<state>/<parameter>`` for optimizer
    state (``exp_avg/...``, ``exp_avg_sq/...``, ``momentum_buffer/...``).
    """

    shards: list[FlatShard]
    scalars: dict[str, float | int]
    """Optimizer step count, schedule position, loss scale, ..."""


OptimizerFactory = Callable[[Iterable[tuple[str, nn.Parameter]]], "Optimizer"]
"""Builds the optimizer from the named trainable parameters, in groups (decay, no decay)."""

ScheduleFactory = Callable[["Optimizer"], "LRScheduler"]


LOSS_LABELS = "loss_labels"
"""Argument of a model that ``FusesLoss``: int64 [B, S], the target after each position."""
NUM_TARGETS = "num_targets"
"""Argument beside it: how many of them are not IGNORE_INDEX, an int."""
NUM_DOCUMENTS = "num_documents"
"""Argument of every model: ``Batch.num_documents``, known to the host without waiting."""


class FusesLoss:
    """A causal model that, asked with ``LOSS_LABELS``, returns the sum of losses, and no logits."""


def innermost(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside of what an engine wraps around it."""
    while isinstance(inner := model._modules.get("module"), nn.Module):
        model = inner
    return model


class Engine(Protocol):
    """How a model is spread over ranks, and everything that depends on it."""

    model: nn.Module
    """What the trainer calls; forward of the prepared model."""
    module: nn.Module
    """The Hugging Face model itself with the engine's hooks on it, for generation."""
    grad_scale: float
    """Factor on a loss already divided by the global token count that undoes the engine's mean."""
    skipped_steps: int
    """Optimizer steps that fp16 loss scaling has skipped because of overflow; 0 elsewhere."""

    def prepare(
        self,
        model: nn.Module,
        spec: ModelSpec,
        *,
        source: TensorSource,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory,
        recompute: Recompute,
        compile_blocks: bool,
    ) -> None:
        """Recompute -> compile -> shard -> load -> optimizer, from a model on the meta device."""
        ...

    def compute(self) -> AbstractContextManager[None]:
        """Around a forward pass outside of ``micro``: it computes in the precision's dtype."""
        ...

    def micro(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro batch; ``last`` ends the accumulation."""
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss."""
        ...

    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale gradients to a global norm of at most ``max_norm`` (0: only measure).

        Returns the norm before scaling: fp32 scalar on the device, equal on all ranks.
        """
        ...

    def step(self) -> None:
        """Optimizer, schedule, zero_grad."""
        ...

    def learning_rate(self) -> float:
        """Of the first parameter group, for the step to come."""
        ...

    def state(self) -> EngineState:
        """What ``load_state`` takes to go on bit for bit; shares storage with the engine."""
        ...

    def load_state(self, source: TensorSource, scalars: Mapping[str, float | int]) -> None:
        """Go on where a state was taken, by any engine on any number of ranks."""
        ...

    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Each trainable parameter whole, fp32 on CPU, one at a time; None on ranks but the first.

        Collective: every rank must run through it.
        """
        ...


@dataclass(frozen=True)
class InjectReport:
    """What a method did to the model."""

    method: str
    replaced: Mapping[str, int]
    """Type of module replaced or added -> how often."""
    trainable: int
    total: int


class PeftMethod(Protocol):
    """Module surgery on a built model: adapters in, everything else frozen."""

    export_name: str
    """Folder of what ``save`` writes in a run: ``adapter``, or ``model`` for the whole of it."""

    def inject(self, model: nn.Module, spec: ModelSpec) -> InjectReport:
        """On the meta device, in place. ConfigError if a target matches nothing."""
        ...

    def source(self, model: nn.Module, seed: int) -> TensorSource:
        """Initial values of the parameters that ``inject`` added, keyed by name and seed."""
        ...

    def stored_name(self, name: str) -> str:
        """Name in the base checkpoint of a parameter of the injected model."""
        ...

    def save(self, tensors: Iterator[tuple[str, torch.Tensor | None]], folder: str) -> None:
        """Write the adapter in PEFT's layout, or the model in Hugging Face's, on the first rank.

        The folder appears whole or not at all. CheckpointError, on the first rank, if it cannot.
        """
        ...

    def saved(self, folder: str) -> TensorSource:
        """Values that ``save`` wrote, under the parameters' names; after ``inject``.

        ConfigError where the folder holds another method, other settings or other layers.
        """
        ...
