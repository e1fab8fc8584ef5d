"""LoRA with two learning rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.errors import ConfigError
from dtune.peft.schema import PEFT
from dtune.peft.schema.lora import LoraConfig

if TYPE_CHECKING:
    from dtune.types import PeftMethod


@PEFT.register
@dataclass
class LoraPlusConfig(LoraConfig):
    """LoRA whose B learns faster than its A (LoRA+), Hayou et al. 2024, arXiv:2402.12354."""

    name: str = "lora_plus"
    # Learning rate of B over that of A, which is optim.lr; half the optim.lr of LoRA is usual.
    lr_ratio: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_ratio < 1:
            raise ConfigError(
                f"peft.lr_ratio={self.lr_ratio} must be at least 1, where it is peft=lora"
            )

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.lora_plus import LoraPlus

        return LoraPlus(self)
