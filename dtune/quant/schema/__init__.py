"""Configs of how the frozen base is stored, one module each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.registry import Registry

if TYPE_CHECKING:
    import torch

    from dtune.types import Quantizer


@dataclass
class QuantConfig:
    """Storage of frozen linear weights."""

    name: str = "???"

    def build(self, device: torch.device) -> Quantizer:
        """Import and construct what replaces the linears; weights are quantised on ``device``."""
        raise NotImplementedError(type(self))


QUANT: Registry[QuantConfig] = Registry("quant", QuantConfig, __name__)
