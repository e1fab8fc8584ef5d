"""One optimizer step: the arithmetic of the loss over micro batches and ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dtune.runtime.watch.heartbeat import Place, at
from dtune.runtime.world import World
from dtune.train.guard import Guard, Verdict
from dtune.train.own_time import OwnTime
from dtune.types import Batch, Engine, Objective, TakesPartInSteps


@dataclass(frozen=True)
class StepStats:
    """Numbers of one optimizer step, still on the device."""

    step: int
    """Number of steps done with this one."""
    loss_share: torch.Tensor
    """fp32 scalar: this rank's share of the mean loss; the sum over ranks is the step's loss."""
    verdict: Verdict
    """The step's loss, and whether the optimizer has taken the step."""
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
    guard: Guard,
    left_out: bool = False,
    own_time: OwnTime | None = None,
    participant: TakesPartInSteps | None = None,
    total_steps: int = 0,
) -> StepStats:
    """Train on the micro batches of one optimizer step.

    The loss is the sum over all target tokens of all ranks and micro batches, divided by their
    number: it does not depend on how rows are split, padded or packed. The penalty of a
    ``participant`` is minimised with it, and is not part of it. The optimizer does not take a
    step that the guard finds bad, or that is ``left_out``.
    """
    counts = world.sum(count_tokens(batches).to(world.device, non_blocking=True))
    # A step without any target has a loss of 0, not 0 / 0.
    targets = counts[0].clamp(min=1)
    loss = torch.zeros((), dtype=torch.float32, device=world.device)
    clock = own_time or OwnTime(world.device)
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        at(Place.forward, index)
        with engine.micro(last=last):
            with clock.forward():
                parts = objective.loss(engine.model, batch.to(world.device))
            mean = parts.total / targets
            minimised = mean
            if last and participant is not None:
                # Every rank adds its share, because gradients are summed over ranks.
                minimised = mean + participant.penalty() / world.size
            at(Place.backward, index)
            engine.backward(minimised * engine.grad_scale)
        loss += mean.detach()
    at(Place.update)
    learning_rate = engine.learning_rate()
    grad_norm = engine.clip(max_norm)
    verdict = guard.judge(loss, grad_norm, left_out=left_out)
    if participant is None:
        engine.step(verdict.blocked)
    else:
        _step_with(participant, engine, verdict, step, total_steps)
    return StepStats(step, loss, verdict, grad_norm, counts, learning_rate)


def _step_with(
    participant: TakesPartInSteps, engine: Engine, verdict: Verdict, step: int, total_steps: int
) -> None:
    """Step; a blocked step, or one that fp16 has skipped, does not count for the participant.

    Waits for the device: the participant keeps averages of gradients, and decides on the host.
    """
    if bool(verdict.blocked):
        engine.pass_over()
        return
    participant.before_step()
    skipped = engine.skipped_steps
    engine.step()
    if engine.skipped_steps == skipped:
        participant.after_step(step, total_steps)


def count_tokens(batches: Sequence[Batch]) -> torch.Tensor:
    """Targets, tokens and slots of this rank's micro batches: int64 [3] on the CPU."""
    return torch.tensor(
        [
            sum(batch.num_targets for batch in batches),
            sum(batch.num_tokens for batch in batches),
            sum(batch.num_slots for batch in batches),
        ]
    )
