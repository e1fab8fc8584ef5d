"""Frozen weights in the 4-bit NormalFloat."""

from __future__ import annotations

from dataclasses import dataclass

from dtune.quant.schema import QUANT, FourBitConfig


@QUANT.register
@dataclass
class Nf4Config(FourBitConfig):
    """16 quantiles of a normal distribution, Dettmers et al. 2023, arXiv:2305.14314."""

    name: str = "nf4"
