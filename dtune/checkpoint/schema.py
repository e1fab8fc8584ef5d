"""Config of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dtune.errors import ConfigError


class Best(Enum):
    """Metric of the best checkpoint."""

    loss = "loss"
    exact_match = "exact_match"


class OnError(Enum):
    """What becomes of a run after a save that failed."""

    stop = "stop"
    go_on = "go_on"


@dataclass
class CheckpointConfig:
    """When a run is saved, and what is kept."""

    name: str = "default"
    # Optimizer steps between checkpoints; 0: only the best so far, and at the end.
    every: int = 100
    # Newest checkpoints that are kept; the best one is always kept beside them.
    keep: int = 2
    # Metric of evaluation that decides which checkpoint is the best.
    best: Best = Best.loss
    # Write in a background thread after copying the state to host memory.
    asynchronous: bool = True
    # Read every file back from the disk before the checkpoint is published.
    read_back: bool = True
    # After a save that failed: stop the run, or go_on to the next; one at the end always stops it.
    on_error: OnError = OnError.stop

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"checkpoint.every={self.every} must be 0 (only at the end) or more")
        if self.keep < 1:
            raise ConfigError(f"checkpoint.keep={self.keep} must be at least 1")
