"""Configs and choices that every layer may know. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dtune.errors import ConfigError


class Recompute(Enum):
    """Which activations of a block the backward pass computes again; auto: the least that fits."""

    auto = "auto"
    none = "none"
    selective = "selective"
    full = "full"


class Precision(Enum):
    """Compute dtype. What is trained always has fp32 masters."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


@dataclass
class PrecisionConfig:
    """Arithmetic of forward and backward."""

    # fp32, bf16, or fp16 with loss scaling; frozen weights are stored in it, trained ones in fp32.
    name: Precision = Precision.fp32


class Progress(Enum):
    """How progress shows: a bar on a terminal, or a line a step."""

    auto = "auto"
    bar = "bar"
    lines = "lines"


class WandbMode(Enum):
    """Whether wandb sends anything."""

    offline = "offline"
    online = "online"


@dataclass
class LogConfig:
    """Where numbers go. metrics.jsonl is always written."""

    name: str = "jsonl"
    # auto: a bar on a terminal, one line a step elsewhere.
    progress: Progress = Progress.auto
    # Optimizer steps between two lines on the terminal; metrics.jsonl has every step.
    every: int = 1
    # Write TensorBoard event files to RUN/tensorboard.
    tensorboard: bool = False
    # Write a wandb run to RUN/wandb.
    wandb: bool = False
    # Project of the wandb run.
    wandb_project: str = "dtune"
    # offline needs no key and sends nothing; online sends to the server you are logged in to.
    wandb_mode: WandbMode = WandbMode.offline

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"log.every={self.every} must be at least 1")
