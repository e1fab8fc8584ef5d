"""Frozen weights stay in the compute dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.quant.schema import QUANT, QuantConfig

if TYPE_CHECKING:
    import torch

    from dtune.types import Quantizer


@QUANT.register
@dataclass
class NoneConfig(QuantConfig):
    """No quantisation."""

    name: str = "none"

    def build(self, device: torch.device) -> Quantizer:
        """Import and construct what leaves every linear as it is."""
        from dtune.quant.keep import Keep

        return Keep()
