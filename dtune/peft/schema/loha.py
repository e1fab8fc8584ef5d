"""Low-rank Hadamard products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.peft.schema import PEFT
from dtune.peft.schema.tuners import FactorConfig

if TYPE_CHECKING:
    from dtune.types import PeftMethod


@PEFT.register
@dataclass
class LohaConfig(FactorConfig):
    """LoHa, Hyeon-Woo et al. 2021, arXiv:2108.06098: W + (alpha / rank) (A1 B1) * (A2 B2).

    The update has up to the square of the factors' rank.
    """

    name: str = "loha"

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.loha import Loha

        return Loha(self)
