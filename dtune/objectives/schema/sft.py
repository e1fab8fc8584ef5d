"""Supervised fine-tuning on conversations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.objectives.schema import OBJECTIVES, ObjectiveConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dtune.types import Objective


@OBJECTIVES.register
@dataclass
class SftConfig(ObjectiveConfig):
    """Loss on what the assistant says, as the chat template's generation markers tell."""

    name: str = "sft"

    def build(self, tokenizer: PreTrainedTokenizerBase) -> Objective:
        """Import and construct the objective."""
        from dtune.objectives.sft import Sft

        return Sft(self, tokenizer)
