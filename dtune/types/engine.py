"""How a model is spread over ranks, and the state that goes into a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import nn

from dtune.runtime.schema import Precision, Recompute
from dtune.types.model import ModelSpec, TensorSource

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler


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


class Stateful(Protocol):
    """What a checkpoint is taken of, and gives back to."""

    def state(self) -> EngineState:
        """What ``load_state`` takes to go on bit for bit; shares storage with what it is of."""
        ...

    def load_state(self, source: TensorSource, scalars: Mapping[str, float | int]) -> None:
        """Go on where a state was taken, by any engine on any number of ranks."""
        ...


class OptimizerFactory(Protocol):
    """Builds the optimizer from the named trainable parameters, in groups (decay, no decay)."""

    def __call__(self, named: Iterable[tuple[str, nn.Parameter]], /, *, whole: bool) -> Optimizer:
        """``whole``: parameters and gradients are whole tensors, to be put where it likes."""
        ...


@runtime_checkable
class GathersGradients(Protocol):
    """An optimizer over one buffer, which reads ``found_inf`` on the device."""

    found_inf: torch.Tensor | None

    def gather(self) -> torch.Tensor:
        """The buffer [n] with all gradients of the step, of which they have become views."""
        ...


ScheduleFactory = Callable[["Optimizer"], "LRScheduler"]


class Engine(Protocol):
    """How a model is spread over ranks, and everything that depends on it."""

    model: nn.Module
    """What the trainer calls; forward of the prepared model."""
    module: nn.Module
    """The Hugging Face model itself with the engine's hooks on it, for generation."""
    precision: Precision
    """What it computes in; fp16 scales losses and skips steps that overflow."""
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
        offload: bool = False,
    ) -> None:
        """Recompute -> compile -> shard -> load -> optimizer, from a model on the meta device.

        ``offload``: what a block saves for backward waits in host memory.
        """
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

    def step(self, blocked: torch.Tensor | None = None) -> None:
        """Optimizer, schedule, zero_grad.

        Where ``blocked``, a bool scalar on the device and equal on all ranks, is true, the step is
        passed over.
        """
        ...

    def pass_over(self) -> None:
        """Drop the gradients; the schedule goes on, parameters and optimizer stay as they are."""
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
