"""Configs of evaluation on held-out rows, and of generating answers."""

from __future__ import annotations

from dataclasses import dataclass

from dtune.errors import ConfigError


@dataclass
class EvaluateConfig:
    """What is measured on data.eval_path."""

    # Evaluate once before the first step.
    before: bool = True
    # Generate an answer to every held-out prompt and count exact matches (greedy decoding).
    generate: bool = True
    # Most new tokens of an answer.
    max_new_tokens: int = 64
    # Prompts generated from at once, per rank.
    batch_size: int = 32
    # Held-out rows that are generated from; 0: all.
    max_rows: int = 0

    def __post_init__(self) -> None:
        for key, value in (
            ("max_new_tokens", self.max_new_tokens),
            ("batch_size", self.batch_size),
        ):
            if value < 1:
                raise ConfigError(f"evaluate.{key}={value} must be at least 1")
        if self.max_rows < 0:
            raise ConfigError(f"evaluate.max_rows={self.max_rows} must be 0 (all rows) or more")


@dataclass
class SamplingConfig:
    """How answers are generated."""

    # Most new tokens of an answer.
    max_new_tokens: int = 256
    # 0: the likeliest token each time; above 0: drawn, the more evenly the higher.
    temperature: float = 0.0
    # Draw from the likeliest tokens only that together have this probability.
    top_p: float = 1.0
    # Seed of what is drawn.
    seed: int = 1

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature} must be 0 (greedy) or above")
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.top_p < 1.0 and self.temperature == 0:
            raise ConfigError(
                f"top_p={self.top_p} draws tokens, temperature=0 draws none; set temperature=1"
            )
        if self.seed < 0:
            raise ConfigError(f"seed={self.seed} must be 0 or more")
