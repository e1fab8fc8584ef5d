"""LoRA+, Hayou et al. 2024, arXiv:2402.12354."""

from __future__ import annotations

from dtune.peft.lora import Lora
from dtune.peft.schema.lora_plus import LoraPlusConfig


class LoraPlus(Lora):
    """LoRA whose B has a learning rate of its own."""

    config: LoraPlusConfig

    def __init__(self, config: LoraPlusConfig) -> None:
        super().__init__(config)

    def rate_factor(self, name: str) -> float:
        """``peft.lr_ratio`` for B, 1 for A."""
        return self.config.lr_ratio if name.endswith(".lora_B") else 1.0
