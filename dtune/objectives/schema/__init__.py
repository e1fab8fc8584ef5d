"""Configs of the objectives, one module each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dtune.types import Objective


@dataclass
class ObjectiveConfig:
    """What a row becomes, and what the loss is."""

    name: str = "???"

    def build(self, tokenizer: PreTrainedTokenizerBase) -> Objective:
        """Import and construct the objective."""
        raise NotImplementedError(type(self))


OBJECTIVES: Registry[ObjectiveConfig] = Registry("objective", ObjectiveConfig, __name__)
