"""Learning rate over a run."""

from __future__ import annotations

import math
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from dtune.errors import ConfigError
from dtune.optim.schema.schedule import ScheduleConfig, Shape


def factor(config: ScheduleConfig, total_steps: int, step: int) -> float:
    """Return the factor on the learning rate of a step, counted from 0.

    Rises linearly to 1 over the warm-up, so that the first step already moves, and reaches
    ``min_factor`` at the last step.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.name is Shape.constant:
        return 1.0
    span = max(1, total_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    course = 1.0 - progress
    if config.name is Shape.cosine:
        course = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_factor + (1.0 - config.min_factor) * course


def build_schedule(config: ScheduleConfig, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    """Build the schedule of a run of ``total_steps`` optimizer steps."""
    check_steps(config, total_steps)
    return LambdaLR(optimizer, partial(factor, config, total_steps))


def check_steps(config: ScheduleConfig, total_steps: int) -> None:
    """Raise ConfigError where the warm-up leaves no step of the run."""
    assert total_steps >= 1
    if config.warmup_steps >= total_steps:
        raise ConfigError(
            f"schedule.warmup_steps={config.warmup_steps} leaves none of the run's {total_steps} "
            "steps; lower it or raise train.max_steps"
        )
