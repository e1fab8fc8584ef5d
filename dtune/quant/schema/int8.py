"""Frozen weights as 8-bit integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.quant.schema import QUANT, ByteConfig

if TYPE_CHECKING:
    import torch

    from dtune.types import Quantizer


@QUANT.register
@dataclass
class Int8Config(ByteConfig):
    """Integers, each output row with a scale: Dettmers et al. 2022, arXiv:2208.07339, section 2.1.

    Activations are not quantised.
    """

    name: str = "int8"

    def build(self, device: torch.device) -> Quantizer:
        """Import and construct what replaces the linears; weights are quantised on ``device``."""
        from dtune.quant.replace import int8_quantizer

        return int8_quantizer(self, device)
