"""VeRA, Kopiczko et al. 2023, arXiv:2310.11454, by HF ``peft``."""

from __future__ import annotations

import peft

from dtune.peft.schema.vera import VeraConfig
from dtune.peft.tuners import Tuner


class Vera(Tuner):
    """Scales of two random projections, which all layers share and the saved adapter holds."""

    key = "peft=vera"

    def __init__(self, config: VeraConfig) -> None:
        super().__init__(config.targets)
        self.config = config

    def peft_config(self, targets: list[str]) -> peft.PeftConfig:
        """Settings as ``peft`` takes them."""
        return peft.VeraConfig(
            r=self.config.rank,
            target_modules=targets,
            projection_prng_key=self.config.projection_seed,
            save_projection=True,
            vera_dropout=self.config.dropout,
            d_initial=self.config.initial_scale,
        )
