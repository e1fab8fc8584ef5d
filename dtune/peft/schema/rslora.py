"""Rank-stabilised LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.peft.schema import PEFT
from dtune.peft.schema.lora import LoraConfig

if TYPE_CHECKING:
    from dtune.types import PeftMethod


@PEFT.register
@dataclass
class RsloraConfig(LoraConfig):
    """LoRA scaled by alpha / sqrt(rank), Kalajdzievski 2023, arXiv:2312.03732."""

    name: str = "rslora"

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.rslora import Rslora

        return Rslora(self)
