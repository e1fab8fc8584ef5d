"""IA3, Liu et al. 2022, arXiv:2205.05638: learned scales of activations, by HF ``peft``."""

from __future__ import annotations

import peft
from torch import nn

from dtune.errors import ConfigError
from dtune.peft.schema.ia3 import Ia3Config
from dtune.peft.targets import plan_targets
from dtune.peft.tuners import Tuner
from dtune.types import ModelSpec


class Ia3(Tuner):
    """Scales of the outputs of the targets, and of the inputs of ``peft.feedforward``."""

    key = "peft=ia3"

    def __init__(self, config: Ia3Config) -> None:
        super().__init__(config.targets)
        self.config = config
        self._scaled_inputs: list[str] = []

    def plan(self, model: nn.Module, spec: ModelSpec) -> list[str]:
        """Paths of the targets. ConfigError for a target that matches nothing."""
        paths = super().plan(model, spec)
        if self.config.feedforward:
            found = plan_targets(model, spec, self.config.feedforward)
            self._scaled_inputs = [path for path in paths if path in found]
            if not self._scaled_inputs:
                raise ConfigError(
                    f"peft.feedforward={self.config.feedforward} names none of peft.targets="
                    f"{self.config.targets}; set peft.feedforward=[] to scale outputs alone"
                )
        return paths

    def peft_config(self, targets: list[str]) -> peft.PeftConfig:
        """Settings as ``peft`` takes them."""
        leaves = sorted({path.rpartition(".")[2] for path in self._scaled_inputs})
        meant = [path for path in self._paths if path.rpartition(".")[2] in leaves]
        # By last components only where those say it all of both, because peft wants a subset.
        if meant == self._scaled_inputs and not set(targets) & set(self._paths):
            return peft.IA3Config(target_modules=targets, feedforward_modules=leaves)
        scaled = list(self._scaled_inputs)
        return peft.IA3Config(target_modules=list(self._paths), feedforward_modules=scaled)
