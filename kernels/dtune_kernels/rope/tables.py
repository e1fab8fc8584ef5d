"""Rotary tables by position.

Shape legend: B rows of a batch, S positions, R rotated features of a head.
"""

from __future__ import annotations

import torch

from dtune_kernels.checks import check


def rotary_tables(
    position_ids: torch.Tensor, inv_freq: torch.Tensor, scaling: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scaling * cos and scaling * sin of position * frequency, both [B, S, R].

    Args:
        position_ids: [B, S]; the angle is computed in fp32.
        inv_freq: [R / 2], radians a position. Feature i and feature i + R / 2 turn together.
        scaling: Factor on both tables, 1 unless the model scales attention (YaRN, LongRoPE).
        dtype: Of the tables; they are rounded once.

    Raises:
        KernelArgumentError: A shape does not fit.

    Su et al. 2021, arXiv:2104.09864, section 3.2.2. Not differentiable.
    """
    shape = list(position_ids.shape)
    check(len(shape) == 2, "rotary_tables", "shape of position_ids", got=shape, wanted="[B, S]")
    shape = list(inv_freq.shape)
    check(len(shape) == 1, "rotary_tables", "shape of inv_freq", got=shape, wanted="[R / 2]")
    with torch.no_grad():
        angles = position_ids[..., None].float() * inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)
