"""Which kernel of torch's scaled-dot-product attention computes it, by card and shape."""

from __future__ import annotations

from enum import Enum

import torch
from torch.nn.attention import SDPBackend

Capability = tuple[int, int]


class MaskKind(Enum):
    """What says which keys a position sees."""

    causal = "causal"
    """Nothing: all before it, as rows that are one document each have it."""
    tensor = "tensor"
    """A tensor of masks."""


_ALWAYS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
_HOPPER = 9
_CUDNN_DIM = 128
"""Largest head for which cuDNN has forward and backward on every version that torch ships."""


def backends(
    capability: Capability, head_dim: int, dtype: torch.dtype, mask: MaskKind
) -> tuple[SDPBackend, ...]:
    """Return the kernels to try, the fastest first; each is left out where it cannot compute this.

    Args:
        capability: Of the card, as CUDA counts.
        head_dim: Features of a head.
        dtype: Of queries, keys and values.
        mask: FlashAttention takes no tensor.

    On Hopper cuDNN is a kernel of FlashAttention 3's class, and torch by itself takes
    FlashAttention 2, which uses half of such a card. On Blackwell cuDNN is left out: wrong results
    have been reported there for few heads of keys (pytorch issue 193893).
    """
    if dtype not in (torch.bfloat16, torch.float16) or capability < (8, 0):
        return _ALWAYS
    if mask is MaskKind.tensor:
        return _ALWAYS
    flash = (SDPBackend.FLASH_ATTENTION, *_ALWAYS) if head_dim <= 256 else _ALWAYS
    has_cudnn = capability[0] == _HOPPER and head_dim % 8 == 0 and head_dim <= _CUDNN_DIM
    return (SDPBackend.CUDNN_ATTENTION, *flash) if has_cudnn else flash


def in_words(chosen: tuple[SDPBackend, ...]) -> str:
    """Names in the order of trial: ``cudnn, flash, efficient, math``."""
    return ", ".join(one.name.removesuffix("_ATTENTION").lower() for one in chosen)
