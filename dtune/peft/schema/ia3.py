"""Learned scales of activations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dtune.peft.schema import PEFT
from dtune.peft.schema.tuners import TunerConfig

if TYPE_CHECKING:
    from dtune.types import PeftMethod


@PEFT.register
@dataclass
class Ia3Config(TunerConfig):
    """IA3, Liu et al. 2022, arXiv:2205.05638: a learned scale of each output, or of each input."""

    name: str = "ia3"
    # Roles (all-linear, attention, mlp, head), module names (q_proj), or globs over dotted paths.
    targets: list[str] = field(default_factory=lambda: ["k_proj", "v_proj", "down_proj"])
    # Those of the targets whose input is scaled instead of their output, named as targets are.
    feedforward: list[str] = field(default_factory=lambda: ["mlp"])

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.ia3 import Ia3

        return Ia3(self)
