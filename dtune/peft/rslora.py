"""Rank-stabilised LoRA, Kalajdzievski 2023, arXiv:2312.03732."""

from __future__ import annotations

import math

from dtune.peft.lora import Lora


class Rslora(Lora):
    """LoRA whose updates do not shrink as the rank grows: theorem 3.2 wants 1 / sqrt(rank)."""

    use_rslora = True

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.config.alpha / math.sqrt(self.config.rank)
