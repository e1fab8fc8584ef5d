"""What engines that step a torch optimizer on this rank's own tensors have in common."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dtune.parallel.ranges import (
    create_optimizer_state,
    fill,
    fill_buffers,
    gather,
    get_step,
    local_of,
    set_step,
    state_shards,
)
from dtune.parallel.scaling import LossScale
from dtune.parallel.wrap import wrap_blocks
from dtune.runtime.schema import Precision, Recompute
from dtune.runtime.world import World
from dtune.types import (
    EngineState,
    FlatShard,
    GathersGradients,
    ModelSpec,
    OptimizerFactory,
    ScheduleFactory,
    TensorSource,
)

# torch warns of what its own FSDP, and DeepSpeed, call in every step, and of an option whose
# replacement older versions lack.
warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
warnings.filterwarnings("ignore", r"`broadcast_buffers` is deprecated", FutureWarning)
# The first step of a run may be one that is passed over.
warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step\(\)` before")

COMPUTE_DTYPES = {
    Precision.fp32: torch.float32,
    Precision.bf16: torch.bfloat16,
    Precision.fp16: torch.float16,
}


def make_masters(model: nn.Module) -> None:
    """Give every trained parameter fp32 storage; on the meta device, in place."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


class TorchEngine(ABC):
    """An engine whose trained parameters are fp32 tensors that a torch optimizer steps.

    Subclasses spread the model and say which flat range of each parameter this rank holds.
    """

    model: nn.Module
    grad_scale: float = 1.0
    skipped_steps: int = 0

    def __init__(self, world: World, precision: Precision) -> None:
        self.world = world
        self.precision = precision
        self.compute_dtype = COMPUTE_DTYPES[precision]
        self._scale = LossScale() if precision is Precision.fp16 else None
        self._norm: torch.Tensor | None = None
        self.module: nn.Module
        self._trained: dict[str, nn.Parameter]
        self._optimizer: Optimizer
        self._gatherer: GathersGradients | None
        self._schedule: LRScheduler
        self._asks_device: bool

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
        """Recompute -> compile -> shard -> load -> optimizer, from a model on the meta device."""
        wrap_blocks(
            model, spec, recompute=recompute, compile_blocks=compile_blocks, offload=offload
        )
        make_masters(model)
        self._spread(model, spec)
        self.module = model
        fill((self._shard(n, p) for n, p in model.named_parameters()), source)
        fill_buffers(model, source)
        self.model = self._wrap(model)
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert self._trained, "nothing to train"
        self._optimizer = optimizer(self._trained.items(), whole=self._holds_whole())
        own = self._optimizer
        self._gatherer = own if isinstance(own, GathersGradients) else None
        self._schedule = schedule(self._optimizer)
        self._asks_device = self._scale is None and _asks_device(self._optimizer, self.world.device)

    @abstractmethod
    def _spread(self, model: nn.Module, spec: ModelSpec) -> None:
        """Shard a model on meta and allocate what this rank holds, in place."""

    @abstractmethod
    def _shard(self, name: str, parameter: nn.Parameter) -> FlatShard:
        """The range of a parameter that this rank holds."""

    def _wrap(self, model: nn.Module) -> nn.Module:
        """The module that the trainer calls, around the loaded model."""
        return model

    def _holds_whole(self) -> bool:
        """Whether parameters and gradients are whole tensors that this engine leaves alone."""
        return False

    def _sum_over_shards(self, squares: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that together hold the whole of each gradient."""
        return squares

    def micro(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro batch; ``last`` ends the accumulation."""
        return self.compute()

    def compute(self) -> AbstractContextManager[None]:
        """Around a forward pass: it computes in the precision's dtype."""
        if self.precision is Precision.fp32:
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=self.compute_dtype)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss."""
        # Autocast belongs to the forward; recomputation restores it by itself.
        with torch.autocast(self.world.device.type, enabled=False):
            (loss if self._scale is None else loss * self._scale.value).backward()

    @torch.no_grad()
    def clip(self, max_norm: float) -> torch.Tensor:
        """Scale gradients to a global norm of at most ``max_norm`` (0: only measure)."""
        grads = self._gradients()
        if self._scale is not None and self._norm is None and grads:
            torch._foreach_mul_(grads, 1.0 / self._scale.value)
        device = grads[0].device if grads else self.world.device
        squares = torch.zeros((), device=device)
        if grads:
            squares = torch.stack(torch._foreach_norm(grads)).square().sum()
        norm = self._sum_over_shards(squares).sqrt()
        if max_norm > 0 and grads:
            torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        self._norm = norm.to(self.world.device)
        return self._norm

    def _gradients(self) -> list[torch.Tensor]:
        """What this rank has of all gradients of the step, or the one buffer that they are in.

        What no loss of the step has reached gets zeros: under every engine the same happens.
        """
        if self._gatherer is not None:
            return [self._gatherer.gather()]
        for parameter in self._trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [local_of(p.grad) for p in self._trained.values() if p.grad is not None]
        return [grad for grad in grads if grad.numel()]

    def step(self, blocked: torch.Tensor | None = None) -> None:
        """Optimizer, schedule, zero_grad; fp16 skips the first two if a gradient overflowed.

        A ``blocked`` step is passed over; where the optimizer can tell on the device that it is,
        the host does not wait to know.
        """
        if blocked is not None and not self._asks_device and bool(blocked):
            self.pass_over()
            return
        if self._scale is not None and not self._scale.accepts(self._norm_of_step()):
            self.skipped_steps += 1
        else:
            if blocked is not None and self._asks_device:
                amp: Any = self._optimizer
                amp.found_inf = blocked.float()
            self._optimizer.step()
            self._schedule.step()
        self._drop_gradients()

    def pass_over(self) -> None:
        """Drop the gradients; the schedule goes on, parameters and optimizer stay as they are."""
        self._schedule.step()
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._norm = None

    def _norm_of_step(self) -> torch.Tensor:
        return self.clip(0.0) if self._norm is None else self._norm

    def learning_rate(self) -> float:
        """Of the first parameter group, for the step to come."""
        return float(self._optimizer.param_groups[0]["lr"])

    def _state_shards(self) -> list[FlatShard]:
        create_optimizer_state(self._optimizer)
        shards = []
        for name, parameter in self._trained.items():
            shard = self._shard(name, parameter)
            shards.append(replace(shard, name=f"param/{name}"))
            shards.extend(state_shards(shard, self._optimizer.state[parameter]))
        return shards

    @torch.no_grad()
    def state(self) -> EngineState:
        """Masters and optimizer state as ranges that share storage with the engine's own."""
        scalars: dict[str, float | int] = {
            "skipped_steps": self.skipped_steps,
            "schedule_position": self._schedule.last_epoch,
        }
        shards = self._state_shards()
        scalars["optimizer_step"] = get_step(self._optimizer)
        if self._scale is not None:
            scalars.update(self._scale.state())
        return EngineState(shards, scalars)

    @torch.no_grad()
    def load_state(self, source: TensorSource, scalars: Mapping[str, float | int]) -> None:
        """Go on where a state was taken, bit for bit on as many ranks."""
        fill(self._state_shards(), source)
        set_step(self._optimizer, int(scalars["optimizer_step"]))
        set_schedule(self._schedule, int(scalars["schedule_position"]))
        self.skipped_steps = int(scalars["skipped_steps"])
        if self._scale is not None:
            self._scale.load(scalars)

    @torch.no_grad()
    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Each trainable parameter whole, fp32 on CPU; None but on the first rank."""
        for name, parameter in self._trained.items():
            yield name, gather(self._shard(name, parameter), self.world)


def _asks_device(optimizer: Optimizer, device: torch.device) -> bool:
    """Whether the optimizer reads on ``device`` that it must not step, as a fused AdamW does.

    It is made for the overflows of automatic mixed precision: neither parameters nor moments nor
    step counts change where ``optimizer.found_inf`` is 1.
    """
    places = {p.device for group in optimizer.param_groups for p in group["params"]}
    fused = isinstance(optimizer, AdamW) and bool(optimizer.defaults["fused"])
    return (fused or isinstance(optimizer, GathersGradients)) and places == {device}


def set_schedule(schedule: LRScheduler, position: int) -> None:
    """Put a schedule, and the learning rates it has set, at a position."""
    schedule.last_epoch = position - 1
    schedule.step()
