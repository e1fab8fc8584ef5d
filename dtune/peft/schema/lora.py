"""Low-rank adaptation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dtune.errors import ConfigError
from dtune.peft.schema import PEFT, PeftConfig

if TYPE_CHECKING:
    from dtune.types import PeftMethod


@PEFT.register
@dataclass
class LoraConfig(PeftConfig):
    """LoRA, Hu et al. 2021, arXiv:2106.09685: y = W x + (alpha / rank) B A dropout(x)."""

    name: str = "lora"
    # Rank of the update of each target.
    rank: int = 16
    # Scale: the update is multiplied by alpha / rank.
    alpha: float = 32.0
    # Probability of dropping an element of the adapter's input.
    dropout: float = 0.0
    # Roles (all-linear, attention, mlp, head), module names (q_proj), or globs over dotted paths.
    targets: list[str] = field(default_factory=lambda: ["all-linear"])

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"peft.rank={self.rank} must be at least 1")
        if self.alpha <= 0:
            raise ConfigError(f"peft.alpha={self.alpha} must be above 0; 2 x peft.rank is usual")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"peft.dropout={self.dropout} must be in [0, 1)")
        if not self.targets:
            raise ConfigError("peft.targets is empty; set it to [all-linear] or name the layers")

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.lora import Lora

        return Lora(self)
