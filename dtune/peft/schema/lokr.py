"""Kronecker products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.errors import ConfigError
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
class LokrConfig(TunerConfig):
    """LoKr, Yeh et al. 2023, arXiv:2309.14859: W + (alpha / rank) (C kron (A B))."""

    name: str = "lokr"
    # Rank of the larger factor; a factor that is no larger than that is kept whole.
    rank: int = 8
    # Scale: the update is multiplied by alpha / rank.
    alpha: float = 16.0
    # Rows and columns of the smaller factor, at most; -1: as near to the square root as divides.
    factor: int = -1
    # Whether the smaller factor is of low rank as well.
    decompose_both: bool = False
    # Probability of leaving an output of the update out of a step.
    rank_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("rank", self.rank, 1)
        check_above_zero("alpha", self.alpha)
        check_probability("rank_dropout", self.rank_dropout)
        if self.factor != -1 and self.factor < 1:
            raise ConfigError(f"peft.factor={self.factor} must be -1, or at least 1")

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.lokr import Lokr

        return Lokr(self)
