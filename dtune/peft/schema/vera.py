"""Learned scales of fixed random projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.peft.schema import PEFT
from dtune.peft.schema.tuners import TunerConfig, check_at_least, check_probability

if TYPE_CHECKING:
    from dtune.types import PeftMethod


@PEFT.register
@dataclass
class VeraConfig(TunerConfig):
    """VeRA, Kopiczko et al. 2023, arXiv:2310.11454: y = W x + b * (B (d * (A dropout(x))))."""

    name: str = "vera"
    # Rows of the random projection A that all layers share.
    rank: int = 256
    # Seed of the random projections, which are the same in every run that has it.
    projection_seed: int = 0
    # First value of the scales d; the scales b start at 0.
    initial_scale: float = 0.1
    # Probability of dropping an element of the adapter's input.
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("rank", self.rank, 1)
        check_probability("dropout", self.dropout)

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.vera import Vera

        return Vera(self)
