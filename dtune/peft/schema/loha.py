"""Low-rank Hadamard products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.peft.schema import PEFT
from dtune.peft.schema.tuners import (
    TunerConfig,
    check_above_zero,
    check_at_least,
    check_probability,
)

if TYPE_CHECKING:
    from dtune.types import PeftMethod


@PEFT.register
@dataclass
class LohaConfig(TunerConfig):
    """LoHa, Hyeon-Woo et al. 2021, arXiv:2108.06098: W + (alpha / rank) (A1 B1) * (A2 B2)."""

    name: str = "loha"
    # Rank of each of the two factors; their product has up to its square.
    rank: int = 8
    # Scale: the update is multiplied by alpha / rank.
    alpha: float = 16.0
    # Probability of leaving an output of the update out of a step.
    rank_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("rank", self.rank, 1)
        check_above_zero("alpha", self.alpha)
        check_probability("rank_dropout", self.rank_dropout)

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.loha import Loha

        return Loha(self)
