"""Configs of the fine-tuning methods, one module each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from dtune.registry import Registry

if TYPE_CHECKING:
    from dtune.types import PeftMethod


@dataclass
class PeftConfig:
    """What is trained."""

    exports_model: ClassVar[bool] = False
    """Whether a run exports a whole model, which needs no base; else an adapter."""

    name: str = "???"
    # Start from what such a run has exported: folder of an adapter (or model); none: anew.
    init_from: str = "none"

    @property
    def start(self) -> Path | None:
        """Folder of ``init_from``; None where the method starts anew."""
        return None if self.init_from == "none" else Path(self.init_from).expanduser()

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        raise NotImplementedError(type(self))


PEFT: Registry[PeftConfig] = Registry("peft", PeftConfig, __name__)
