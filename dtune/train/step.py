"""One optimizer step: the arithmetic of the loss over micro batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dtune.runtime.world import World
from dtune.types import Batch, Engine, Objective


@dataclass(frozen=True)
class StepStats:
    """Numbers of one optimizer step, still on the device."""

    step: int
    """Number of steps done with this one."""
    loss: torch.Tensor
    """fp32 scalar: this rank's share of the mean loss; the sum over ranks is the step's loss."""
    grad_norm: torch.Tensor
    """fp32 scalar: global norm before clipping, equal on all ranks."""
    counts: torch.Tensor
    """int64 [3]: targets, tokens and slots of the step over all ranks."""
    learning_rate: float


def train_step(
    step: int,
    batches: Sequence[Batch],
    *,
    engine: Engine,
    objective: Objective,
    world: World,
    max_norm: float,
) -> StepStats:
    """Train on the micro batches of one optimizer step.

    The loss is the sum over all target tokens of all ranks and micro batches, divided by their
    number: it does not depend on how rows are split, padded or packed.
    """
    counts = world.sum(count_tokens(batches).to(world.device, non_blocking=True))
    # A step without any target has a loss of 0, not 0 / 0.
    targets = counts[0].clamp(min=1)
    loss = torch.zeros((), dtype=torch.float32, device=world.device)
    for index, batch in enumerate(batches):
        with engine.micro(last=index == len(batches) - 1):
            parts = objective.loss(engine.model, batch.to(world.device))
            mean = parts.total / targets
            engine.backward(mean * engine.grad_scale)
        loss += mean.detach()
    learning_rate = engine.learning_rate()
    grad_norm = engine.clip(max_norm)
    engine.step()
    return StepStats(step, loss, grad_norm, counts, learning_rate)


def count_tokens(batches: Sequence[Batch]) -> torch.Tensor:
    """Targets, tokens and slots of this rank's micro batches: int64 [3] on the CPU."""
    return torch.tensor(
        [
            sum(batch.num_targets for batch in batches),
            sum(batch.num_tokens for batch in batches),
            sum(batch.num_slots for batch in batches),
        ]
    )
