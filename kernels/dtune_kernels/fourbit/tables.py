"""The numbers that codes of 4 bits and of 8 bits stand for, and where one code ends.

Shape legend: 16 codes of a weight, 256 codes of a scale.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

GROUP = 256
"""Scales that share a second-level scale."""
GRID = 65535
"""Steps from -1 to 1 to which bitsandbytes' CPU code rounds a scale before it looks up its code."""
TINY = 1e-38
"""Least divisor of a block, and least scale of a last block that is cut short."""

# Quantiles of the normal distribution, Dettmers et al. 2023, arXiv:2305.14314, appendix E.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, two bits of exponent, one of mantissa, in twelfths; bitsandbytes numbers the exponents so.
_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
# bitsandbytes' CUDA code has rounded midpoints.
_FP4_PIVOTS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)


class Codebook(NamedTuple):
    """The 16 numbers of a kind."""

    values: torch.Tensor
    """[16], fp32: the number of each code."""
    pivots: torch.Tensor
    """[15], fp32, ascending: a number above ``pivots[i]`` has at least rank i + 1."""
    order: torch.Tensor
    """[16], int32: the code of each rank."""


class ScaleCodebook(NamedTuple):
    """The 256 numbers of a scale's codes."""

    values: torch.Tensor
    """[256], fp32, ascending."""
    nearest: torch.Tensor
    """[255], fp32: a number above ``nearest[i]`` has at least code i + 1; ties to the even code.
    The rule of bitsandbytes' CUDA code."""
    midpoints: torch.Tensor
    """[255], fp32: the same for a number rounded to the grid; ties to the lower code. The rule of
    its CPU code."""


@functools.cache
def codebook(kind: str, cuda: bool, device: torch.device) -> Codebook:
    """Return the tables of ``nf4`` or ``fp4``, kept on the device from the first call on.

    ``cuda`` takes the pivots of bitsandbytes' CUDA code, which differ for fp4.
    """
    if kind == "nf4":
        values = torch.tensor(_NF4, device="cpu")
    else:
        positive = torch.tensor(_FP4_TWELFTHS, device="cpu") / 12.0
        # 0.0 - x: the code of a negative zero stands for zero.
        values = torch.cat((positive, 0.0 - positive))
    order = torch.argsort(values, stable=True)
    ranked = values[order]
    pivots = (ranked[:-1] + ranked[1:]) / 2
    if cuda and kind == "fp4":
        # Magnitudes are compared, and what is below zero has code 8, not 0, at the least.
        order[7:9] = order[7:9].flip(0)
        positive = torch.tensor(_FP4_PIVOTS, device="cpu")
        zero_and_more = torch.cat((torch.zeros(1, device="cpu"), positive))
        pivots = torch.cat((_just_below(-zero_and_more.flip(0)), positive))
    tables = (values, pivots, order.int())
    return Codebook(*(table.to(device) for table in tables))


@functools.cache
def scale_codebook(device: torch.device) -> ScaleCodebook:
    """Return the tables of the signed dynamic 8-bit code, kept on the device.

    A sign, n leading zeros, a one, and 6 - n bits that divide [0.1, 1] * 10^-n evenly; a number is
    the middle of its part. Dettmers 2016, arXiv:1511.04561, section 3.
    """
    positive = []
    for bits in range(7):
        edges = torch.linspace(0.1, 1, 2**bits + 1, dtype=torch.float32, device="cpu")
        positive.append((edges[:-1] + edges[1:]) / 2.0 * 10.0 ** (bits - 6))
    ends = torch.tensor([0.0, 1.0], device="cpu")
    values = torch.cat((*positive, *(-part for part in positive), ends)).sort().values
    midpoints = (values[:-1] + values[1:]) / 2
    odd = torch.arange(255, device="cpu") % 2 == 1
    nearest = torch.where(odd, _just_below(midpoints), midpoints)
    return ScaleCodebook(*(table.to(device) for table in (values, nearest, midpoints)))


def _just_below(x: torch.Tensor) -> torch.Tensor:
    """What is above the result is at x or above it."""
    return torch.nextafter(x, torch.tensor(-2.0, device="cpu"))
