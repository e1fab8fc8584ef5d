"""Low-rank adaptation with a budget of ranks."""

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
class AdaloraConfig(TunerConfig):
    """AdaLoRA, Zhang et al. 2023, arXiv:2303.10512: y = W x + (alpha / rank) B diag(e) A x."""

    name: str = "adalora"
    # Rank of each target at first.
    rank: int = 12
    # Rank at the end, on average over the targets.
    final_rank: int = 8
    # Scale: the update is multiplied by alpha / rank.
    alpha: float = 32.0
    # Probability of dropping an element of the adapter's input.
    dropout: float = 0.0
    # Share of the steps before ranks are taken away.
    initial_share: float = 0.1
    # Share of the steps at the end, in which ranks stay as they are.
    final_share: float = 0.5
    # Steps between two rounds of taking ranks away.
    prune_every: int = 1
    # Weight of the penalty that keeps A and B orthogonal; the loss that is logged is without it.
    orthogonality: float = 0.5
    # Decay of the average of importance over steps.
    importance_decay: float = 0.85
    # Decay of the average of its uncertainty over steps.
    uncertainty_decay: float = 0.85

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("final_rank", self.final_rank, 1)
        check_above_zero("alpha", self.alpha)
        check_at_least("prune_every", self.prune_every, 1)
        check_at_least("orthogonality", self.orthogonality, 0.0)
        for key in ("dropout", "initial_share", "final_share"):
            check_probability(key, float(vars(self)[key]))
        for key in ("importance_decay", "uncertainty_decay"):
            check_above_zero(key, float(vars(self)[key]))
            check_probability(key, float(vars(self)[key]))
        if self.rank <= self.final_rank:
            raise ConfigError(
                f"peft.rank={self.rank} must be above peft.final_rank={self.final_rank}, because "
                "ranks are taken away; set peft=lora for a rank that stays"
            )
        if self.initial_share + self.final_share >= 1.0:
            raise ConfigError(
                f"peft.initial_share={self.initial_share} and peft.final_share={self.final_share} "
                "leave no steps in which ranks are taken away; lower one of them"
            )

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.adalora import Adalora

        return Adalora(self)
