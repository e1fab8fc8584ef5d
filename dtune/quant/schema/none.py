"""Frozen weights stay in the compute dtype."""

from __future__ import annotations

from dataclasses import dataclass

from dtune.quant.schema import QUANT, QuantConfig


@QUANT.register
@dataclass
class NoneConfig(QuantConfig):
    """No quantisation."""

    name: str = "none"
