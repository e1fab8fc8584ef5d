"""Config of evaluation on held-out rows."""

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
