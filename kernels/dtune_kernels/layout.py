"""Strides that kernels take."""

from __future__ import annotations

import torch


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """Return [..., D] as rows [N, D] whose elements lie beside each other; copies only if it must.

    Rows may lie apart by any distance that is not 0: a gradient that was expanded is copied.
    """
    rows = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    if rows.stride(1) != 1 or (rows.stride(0) == 0 and rows.shape[0] > 1):
        rows = rows.contiguous()
    return rows
