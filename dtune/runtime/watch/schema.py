"""Config of the watchdog. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dtune.errors import ConfigError


class OnHang(Enum):
    """What becomes of a run that hangs."""

    stop = "stop"
    restart = "restart"


@dataclass
class WatchConfig:
    """When a run counts as hung, and what is done then."""

    name: str = "default"
    # Seconds without a sign of life before the first step that count as a hang; 0: never.
    start: float = 3600.0
    # The same in the first step, which compiles and warms up.
    first_step: float = 1800.0
    # The same in later steps; waiting for the next batch is part of a step.
    step: float = 600.0
    # The same while a checkpoint or the exported weights are written.
    save: float = 1800.0
    # The same during evaluation.
    evaluation: float = 1800.0
    # The time-out of steps is at least the longest silence of the steps so far, so many times.
    step_factor: float = 10.0
    # stop: the run ends as hung. restart: the ranks start again, launch.max_restarts times.
    on_hang: OnHang = OnHang.stop
    # Optimizer steps between barriers that name a rank which does not come; 0: never.
    check_every: int = 100
    # A rank that takes so many times as long as the middle one is reported; 0: never.
    slow_factor: float = 2.0
    # Seconds without a word from the machine of a rank after which it counts as lost; 0: never.
    silent: float = 60.0

    def __post_init__(self) -> None:
        for key in ("start", "first_step", "step", "save", "evaluation", "step_factor", "silent"):
            if getattr(self, key) < 0:
                raise ConfigError(f"watch.{key}={getattr(self, key)} must be 0 or more")
        if self.check_every < 0:
            raise ConfigError(f"watch.check_every={self.check_every} must be 0 or more")
        if 0 < self.slow_factor <= 1:
            raise ConfigError(f"watch.slow_factor={self.slow_factor} must be above 1, or 0")
        if 0 < self.silent < 5:
            raise ConfigError(f"watch.silent={self.silent} must be at least 5, or 0")
