"""Kronecker products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.errors import ConfigError
from dtune.peft.schema import PEFT
from dtune.peft.schema.tuners import FactorConfig

if TYPE_CHECKING:
    from dtune.types import PeftMethod


@PEFT.register
@dataclass
class LokrConfig(FactorConfig):
    """LoKr, Yeh et al. 2023, arXiv:2309.14859: W + (alpha / rank) (C kron (A B)).

    A factor that is no larger than its rank is kept whole.
    """

    name: str = "lokr"
    # Rows and columns of the smaller factor, at most; -1: as near to the square root as divides.
    factor: int = -1
    # Whether the smaller factor is of low rank as well.
    decompose_both: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor != -1 and self.factor < 1:
            raise ConfigError(f"peft.factor={self.factor} must be -1, or at least 1")

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.lokr import Lokr

        return Lokr(self)
