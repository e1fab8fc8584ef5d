"""Quantisation of rows to 8 bits in plain PyTorch.

Shape legend: O x K the weight.
"""

from __future__ import annotations

import torch

STEPS = 127.0
ONE_STEP = 1 / STEPS
"""Rounded to fp32, as bitsandbytes' literal is."""


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [O, K], int8, and absmax [O], fp32, of a contiguous weight."""
    wide = weight.float()
    absmax = wide.abs().amax(1) if weight.shape[1] else wide.new_zeros(weight.shape[0])
    scale = absmax.reciprocal() * STEPS
    # A row of zeros, or one so small that its scale overflows, has codes 0.
    scale = torch.where(scale.isfinite(), scale, 0.0)
    scaled = wide * scale[:, None]
    codes = torch.where(scaled.isnan(), 0.0, scaled.round())
    return codes.to(torch.int8), absmax


def dequantize_int8(codes: torch.Tensor, absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight [O, K]: round(round(code * absmax) / 127) in fp32, then in dtype."""
    return (codes * absmax[:, None] * ONE_STEP).to(dtype)
