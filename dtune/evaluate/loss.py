"""Mean loss over held-out rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dtune.data.loader import Loader, prefetch
from dtune.evaluate.mode import AsksToStop, EvaluationStopped, evaluating, never
from dtune.runtime.watch.heartbeat import beat
from dtune.runtime.world import World
from dtune.types import Objective


@dataclass(frozen=True)
class EvalLoss:
    """Loss per predicted token."""

    loss: float
    tokens: int
    """Predicted, over all ranks."""


def evaluate_loss(
    model: nn.Module,
    objective: Objective,
    loader: Loader,
    world: World,
    *,
    asks_to_stop: AsksToStop = never,
) -> EvalLoss:
    """Loss of one pass over the loader's data; equal for any number of ranks and batch size.

    Collective: every rank makes the same number of forward passes. The loader must end
    after one epoch (``epochs=1``), so that no row counts twice. Raises EvaluationStopped where it
    is asked to stop before a step of the loader.
    """
    # float64: the sum does not depend on how rows are spread over batches.
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    with evaluating(model):
        for batches in prefetch(loader, 0, loader.steps_for(1)):
            if asks_to_stop():
                raise EvaluationStopped
            for batch in batches:
                beat()
                parts = objective.loss(model, batch.to(world.device))
                sums[0] += parts.total.double()
                sums[1] += batch.num_targets
    total, tokens = world.sum(sums).tolist()
    return EvalLoss(loss=total / tokens, tokens=int(tokens))
