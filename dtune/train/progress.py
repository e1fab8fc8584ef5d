"""What the training loop itself must have back to go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dtune.train.guard import GuardState


@dataclass
class RunProgress:
    """Counts and decisions of the loop; JSON in a checkpoint."""

    step: int = 0
    tokens: int = 0
    targets: int = 0
    best_step: int = -1
    best_value: float = 0.0
    evaluations_without_gain: int = 0
    first_evaluation: dict[str, float] = field(default_factory=dict)
    last_evaluation: dict[str, float] = field(default_factory=dict)
    last_evaluated_step: int = -1
    guard: GuardState = field(default_factory=GuardState)

    @classmethod
    def parse(cls, saved: Mapping[str, Any]) -> RunProgress:
        """From the JSON of a checkpoint."""
        return cls(**{**saved, "guard": GuardState(**saved.get("guard", {}))})
