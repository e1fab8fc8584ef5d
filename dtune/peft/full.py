"""Full fine-tuning: nothing is added, everything is trained."""

from __future__ import annotations

from torch import nn

from dtune.peft.schema.full import FullConfig
from dtune.peft.whole import WholeModel
from dtune.types import ModelSpec


class Full(WholeModel):
    """Every parameter is trained."""

    name = "full"

    def __init__(self, config: FullConfig) -> None:
        self.config = config

    def plan_trained(self, model: nn.Module, spec: ModelSpec) -> frozenset[str]:
        """All of them."""
        return frozenset(name for name, _ in model.named_parameters())
