"""Configs of how the frozen base is stored, one module each."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dtune.errors import ConfigError
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


@dataclass
class ByteConfig(QuantConfig):
    """Frozen linear weights are kept as bytes."""

    # Linears that stay floats: roles (head, attention, mlp, all-linear), names (down_proj), globs.
    skip: list[str] = field(default_factory=lambda: ["head"])
    # GiB of spare memory for weights that stay dequantised, one layer after another; 0: none.
    cache_gib: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.cache_gib < math.inf:
            raise ConfigError(f"quant.cache_gib={self.cache_gib:g} must be 0 or more, and finite")


@dataclass
class FourBitConfig(ByteConfig):
    """Four bits a weight, blocks of weights with a scale; in bitsandbytes' format."""

    # Keep the scales in 8 bits as well: 4.13 bits a weight instead of 4.5.
    double: bool = True
    # Weights that share a scale: a power of two from 32 to 4096.
    block_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size not in (sizes := [2**n for n in range(5, 13)]):
            shown = ", ".join(map(str, sizes))
            raise ConfigError(f"quant.block_size={self.block_size} must be one of {shown}")

    def build(self, device: torch.device) -> Quantizer:
        """Import and construct what replaces the linears; weights are quantised on ``device``."""
        from dtune.quant.replace import fourbit_quantizer

        return fourbit_quantizer(self, device)


QUANT: Registry[QuantConfig] = Registry("quant", QuantConfig, __name__)
