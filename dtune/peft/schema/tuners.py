"""What the configs of methods from HF ``peft`` share."""

from __future__ import annotations

from dataclasses import dataclass, field

from dtune.errors import ConfigError
from dtune.peft.schema import PeftConfig


@dataclass
class TunerConfig(PeftConfig):
    """Layers of ``peft`` around linear layers."""

    # Roles (all-linear, attention, mlp, head), module names (q_proj), or globs over dotted paths.
    targets: list[str] = field(default_factory=lambda: ["all-linear"])

    def __post_init__(self) -> None:
        if not self.targets:
            raise ConfigError("peft.targets is empty; set it to [all-linear] or name the layers")


@dataclass
class FactorConfig(TunerConfig):
    """An update made of low-rank factors by another product than B A."""

    # Rank of the factors that are of low rank.
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


def check_at_least(key: str, value: float, least: float) -> None:
    """ConfigError for a value below the least one."""
    if value < least:
        raise ConfigError(f"peft.{key}={value} must be at least {least}")


def check_above_zero(key: str, value: float) -> None:
    """ConfigError for a value that is not above 0."""
    if value <= 0:
        raise ConfigError(f"peft.{key}={value} must be above 0")


def check_probability(key: str, value: float) -> None:
    """ConfigError for a value outside of [0, 1)."""
    if not 0.0 <= value < 1.0:
        raise ConfigError(f"peft.{key}={value} must be in [0, 1)")
