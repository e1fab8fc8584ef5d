"""Training of biases and norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dtune.errors import ConfigError
from dtune.peft.schema import PEFT, PeftConfig

if TYPE_CHECKING:
    from dtune.types import PeftMethod


@PEFT.register
@dataclass
class BitfitConfig(PeftConfig):
    """BitFit, Ben Zaken et al. 2021, arXiv:2106.10199: biases and norms are trained."""

    exports_model: ClassVar[bool] = True

    name: str = "bitfit"
    # Train the biases of linear and other layers, where the model has them.
    biases: bool = True
    # Train weights and biases of the norms, found by their class.
    norms: bool = True

    def __post_init__(self) -> None:
        if not self.biases and not self.norms:
            raise ConfigError(
                "peft.biases=false with peft.norms=false trains nothing; set one of them to true"
            )

    def build(self) -> PeftMethod:
        """Import and construct the method."""
        from dtune.peft.bitfit import Bitfit

        return Bitfit(self)
