"""Weight-decomposed low-rank adaptation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.peft.schema import PEFT
from dtune.peft.schema.lora import LowRankConfig

if TYPE_CHECKING:
    from dtune.types import PeftMethod


@PEFT.register
@dataclass
class DoraConfig(LowRankConfig):
    """DoRA, Liu et al. 2024, arXiv:2402.09353: rows of W + scale B A at a trained length."""

    name: str = "dora"

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.dora import Dora

        return Dora(self)
