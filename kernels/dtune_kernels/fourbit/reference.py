"""Quantisation to 4 bits in plain PyTorch.

Shape legend: O x K the weight, N = O * K its elements, B = ceil(N / block) blocks and their scales,
G = ceil(B / 256) groups of scales.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from dtune_kernels.fourbit.tables import GRID, GROUP, TINY, codebook, scale_codebook


def quantize_4bit(
    weight: torch.Tensor, kind: str, block_size: int, cuda: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [ceil(N / 2)], uint8, and absmax [B], fp32, of a contiguous weight.

    ``cuda`` takes the rule of bitsandbytes' CUDA code, otherwise that of its CPU code.
    """
    table = codebook(kind, cuda, weight.device)
    numel = weight.numel()
    blocks = pad(weight.reshape(-1).float(), (0, -numel % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(1)
    scaled = blocks * absmax.clamp(min=TINY).reciprocal()[:, None]
    if numel % block_size and not cuda:
        # The CPU code divides here, where it multiplies elsewhere.
        absmax[-1:].clamp_(min=TINY)
        scaled[-1] = blocks[-1] / absmax[-1]
    ranks = torch.bucketize(scaled, table.pivots, out_int32=True)
    codes = table.order[ranks].to(torch.uint8).view(-1, 2)
    packed = (codes[:, 0] << 4) | codes[:, 1]
    return packed[: (numel + 1) // 2].contiguous(), absmax


def quantize_absmax(
    absmax: torch.Tensor, cuda: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes [B], uint8, absmax2 [G] and offset [1], fp32, of scales absmax [B].

    ``cuda``: see ``quantize_4bit``.
    """
    table = scale_codebook(absmax.device)
    absmax = absmax.float()
    offset = mean(absmax)
    count = absmax.numel()
    groups = pad(absmax - offset, (0, -count % GROUP)).view(-1, GROUP)
    absmax2 = groups.abs().amax(1)
    scaled = groups * absmax2.reciprocal()[:, None]
    if cuda:
        codes = torch.bucketize(scaled, table.nearest, out_int32=True)
    else:
        steps = ((scaled.clamp(-1, 1) + 1) * 0.5 * GRID + 0.5).int()
        codes = torch.bucketize(2.0 * steps / GRID - 1.0, table.midpoints, out_int32=True)
    codes = codes.masked_fill((absmax2 == 0)[:, None], 0)
    return codes.to(torch.uint8).view(-1)[:count].contiguous(), absmax2, offset


def dequantize_4bit(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    absmax2: torch.Tensor | None,
    offset: torch.Tensor | None,
    rows: int,
    columns: int,
    kind: str,
    block_size: int,
    first: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the weight [O, K]: codebook[code] * scale, the product rounded to fp32, then to dtype.

    A scale is absmax, or round(round(codebook[absmax] * absmax2) + offset) in fp32.
    """
    values = codebook(kind, False, codes.device).values
    numel = rows * columns
    if absmax2 is not None and offset is not None:
        groups = (torch.arange(absmax.numel(), device=absmax.device) + first) // GROUP
        scaled = scale_codebook(absmax.device).values[absmax.int()] * absmax2[groups]
        absmax = scaled + offset
    nibbles = torch.stack((codes >> 4, codes & 15), -1).view(-1)[:numel]
    decoded = values[nibbles.int()]
    product = pad(decoded, (0, -numel % block_size)).view(-1, block_size) * absmax[:, None]
    return product.view(-1)[:numel].to(dtype).view(rows, columns)


def mean(absmax: torch.Tensor) -> torch.Tensor:
    """Mean [1]; 0 of nothing."""
    return absmax.mean().view(1) if absmax.numel() else absmax.new_zeros(1)
