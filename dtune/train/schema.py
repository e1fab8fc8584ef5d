"""Config of the training loop."""

from __future__ import annotations

from dataclasses import dataclass

from dtune.errors import ConfigError
from dtune.runtime.schema import Recompute


@dataclass
class TrainConfig:
    """How long, in batches of which size, and how often it is looked at."""

    # Optimizer steps; 0: as many as train.epochs takes.
    max_steps: int = 0
    # Passes over the data, where max_steps is 0.
    epochs: float = 1.0
    # Sequences of one forward pass on one rank.
    micro_batch_size: int = 2
    # Sequences of one optimizer step over all ranks and accumulation.
    global_batch_size: int = 16
    # Largest global norm of the gradient; 0: measured, never clipped.
    max_norm: float = 1.0
    # Optimizer steps between evaluations; 0: only before and after.
    eval_every: int = 0
    # Evaluations without improvement after which the run stops; 0: never.
    early_stopping: int = 0
    # Activations computed again in backward: none, selective (all but large products) or full;
    # auto: the least that fits the memory of a rank.
    recompute: Recompute = Recompute.none
    # Keep activations of all blocks but the last in host memory until backward needs them.
    offload_activations: bool = False
    # Compile every block with torch.compile.
    compile: bool = False
    # First steps that are left out of tokens/s.
    warmup_steps_untimed: int = 2

    def __post_init__(self) -> None:
        at_least_one = ("micro_batch_size", "global_batch_size")
        for key in at_least_one:
            if getattr(self, key) < 1:
                raise ConfigError(f"train.{key}={getattr(self, key)} must be at least 1")
        at_least_zero = (
            "max_steps",
            "max_norm",
            "eval_every",
            "early_stopping",
            "warmup_steps_untimed",
        )
        for key in at_least_zero:
            if getattr(self, key) < 0:
                raise ConfigError(f"train.{key}={getattr(self, key)} must be 0 or more")
        if self.max_steps == 0 and self.epochs <= 0:
            raise ConfigError("train.max_steps=0 needs train.epochs above 0")
