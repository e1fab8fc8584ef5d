"""Linears in 4 bits, made of float ones as a run makes them."""

from __future__ import annotations

import torch
from torch import nn

from dtune.quant.layout import FourBitLayout
from dtune.quant.linear import QuantizedLinear
from dtune.quant.source import QuantizedSource
from tests.contracts.small_models import DictSource, read_whole

CPU = torch.device("cpu")


def in_4_bits(linear: nn.Linear) -> QuantizedLinear:
    """The linear with its weight in nf4, with scales in 8 bits."""
    layout = FourBitLayout((linear.out_features, linear.in_features), "nf4", 64, double=True)
    kept = QuantizedLinear(layout, linear.bias, CPU)
    source = QuantizedSource(DictSource({"x.weight": linear.weight}), {"x": layout}, CPU)
    for part in layout.sizes:
        kept.get_parameter(part).data.copy_(read_whole(source, f"x.{part}"))
    return kept
