"""Configs of the fine-tuning methods, one module each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.registry import Registry

if TYPE_CHECKING:
    from dtune.types import PeftMethod


@dataclass
class PeftConfig:
    """What is trained."""

    name: str = "???"

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        raise NotImplementedError(type(self))


PEFT: Registry[PeftConfig] = Registry("peft", PeftConfig, __name__)
