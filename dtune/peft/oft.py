"""OFT, Qiu et al. 2023, arXiv:2306.07280, with rotated inputs (arXiv:2506.19847), by ``peft``."""

from __future__ import annotations

import peft
from torch import nn

from dtune.errors import ConfigError
from dtune.peft.schema.oft import OftConfig
from dtune.peft.tuners import Tuner, linears_of
from dtune.types import ModelSpec


class Oft(Tuner):
    """Rotations of the inputs of the targets, in blocks; all else is frozen."""

    key = "peft=oft"

    def __init__(self, config: OftConfig) -> None:
        super().__init__(config.targets)
        self.config = config

    def plan(self, model: nn.Module, spec: ModelSpec) -> list[str]:
        """Paths of the targets. ConfigError where blocks do not divide the inputs of one."""
        paths, size = super().plan(model, spec), self.config.block_size
        for path, (inputs, _, _) in linears_of(model, paths).items():
            if inputs % size:
                raise ConfigError(
                    f"peft.block_size={size} does not divide the {inputs} inputs of {path}; set "
                    "it to a divisor of all of them, such as a power of 2"
                )
        return paths

    def peft_config(self, targets: list[str]) -> peft.PeftConfig:
        """Settings as ``peft`` takes them."""
        terms = self.config.neumann_terms
        return peft.OFTConfig(
            oft_block_size=self.config.block_size,
            target_modules=targets,
            block_share=self.config.share_blocks,
            use_cayley_neumann=terms > 0,
            num_cayley_neumann_terms=terms or 5,
        )
