"""Full fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dtune.peft.schema import PEFT, PeftConfig

if TYPE_CHECKING:
    from dtune.types import PeftMethod


@PEFT.register
@dataclass
class FullConfig(PeftConfig):
    """Every parameter is trained."""

    exports_model: ClassVar[bool] = True

    name: str = "full"

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.full import Full

        return Full(self)
