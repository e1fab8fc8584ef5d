"""Next-token prediction on text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.objectives.schema import OBJECTIVES, ObjectiveConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dtune.types import Objective


@OBJECTIVES.register
@dataclass
class PretrainConfig(ObjectiveConfig):
    """Loss on every token; each document ends with the tokenizer's end-of-sequence token."""

    name: str = "pretrain"

    def build(self, tokenizer: PreTrainedTokenizerBase) -> Objective:
        """Import and construct the objective."""
        from dtune.objectives.pretrain import Pretrain

        return Pretrain(self, tokenizer)
