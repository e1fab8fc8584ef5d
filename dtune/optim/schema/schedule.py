"""Config of the learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dtune.errors import ConfigError


class Shape(Enum):
    """Course of the learning rate after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass
class ScheduleConfig:
    """Learning rate over the run, as a factor on optim.lr."""

    # constant, linear (to min_factor) or cosine (to min_factor).
    name: Shape = Shape.cosine
    # Steps over which the rate rises linearly from 0 to optim.lr.
    warmup_steps: int = 0
    # Factor at the last step.
    min_factor: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ConfigError(f"schedule.warmup_steps={self.warmup_steps} must be 0 or more")
        if not 0.0 <= self.min_factor <= 1.0:
            raise ConfigError(f"schedule.min_factor={self.min_factor} must be in [0, 1]")
