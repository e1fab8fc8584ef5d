"""Bottleneck adapters."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from dtune.errors import ConfigError
from dtune.peft.schema import PEFT, PeftConfig

if TYPE_CHECKING:
    from dtune.types import PeftMethod


class Kind(Enum):
    """Where adapters are put in a block."""

    houlsby = "houlsby"
    pfeiffer = "pfeiffer"
    parallel = "parallel"


class Activation(Enum):
    """Between the two projections of an adapter."""

    relu = "relu"
    gelu = "gelu"
    silu = "silu"


@PEFT.register
@dataclass
class AdapterConfig(PeftConfig):
    """Bottleneck adapters after attention and MLP, or beside the MLP of each block."""

    name: str = "adapter"
    # houlsby: after attention and after the MLP (arXiv:1902.00751); pfeiffer: after the MLP
    # (arXiv:2005.00247); parallel: beside the MLP (arXiv:2110.04366).
    kind: Kind = Kind.houlsby
    # Features between the two projections.
    bottleneck: int = 64
    # Between the two projections.
    activation: Activation = Activation.relu
    # Probability of dropping an element between the two projections.
    dropout: float = 0.0
    # Factor on what an adapter adds; with parallel, He et al. take 4.
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.bottleneck < 1:
            raise ConfigError(f"peft.bottleneck={self.bottleneck} must be at least 1; 64 is usual")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"peft.dropout={self.dropout} must be in [0, 1)")
        if self.scale <= 0:
            raise ConfigError(f"peft.scale={self.scale} must be above 0; 1 adds what is computed")

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.adapter import Adapter

        return Adapter(self)
