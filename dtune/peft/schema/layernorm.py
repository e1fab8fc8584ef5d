"""Norms alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dtune.peft.schema import PEFT
from dtune.peft.schema.tuners import TunerConfig

if TYPE_CHECKING:
    from dtune.types import PeftMethod


@PEFT.register
@dataclass
class LayernormConfig(TunerConfig):
    """LayerNorm tuning, Zhao et al. 2023, arXiv:2312.11420: weights (and biases) of norms."""

    name: str = "layernorm"
    # Norms: all-norms, module names (input_layernorm), or globs over dotted paths.
    targets: list[str] = field(default_factory=lambda: ["all-norms"])

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.layernorm import Layernorm

        return Layernorm(self)
