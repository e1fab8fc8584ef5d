"""Frozen weights as 4-bit floats."""

from __future__ import annotations

from dataclasses import dataclass

from dtune.quant.schema import QUANT, FourBitConfig


@QUANT.register
@dataclass
class Fp4Config(FourBitConfig):
    """4-bit floats: sign, two bits of exponent, one of mantissa."""

    name: str = "fp4"
