"""A linear whose frozen weight is bytes.

Shape legend: K input features, O output features; leading dims are any.
"""

from __future__ import annotations

from typing import Any

import torch
from dtune_kernels.library import apply
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dtune.quant.layout import ByteWeight, Layout


class QuantizedLinear(nn.Module):
    """y = x W^T + b, with W dequantised for each use, and kept only by ``keep_floats``.

    The parts of W (see ``dtune.quant.layout``) are uint8 parameters that are never trained.
    Computes in the dtype of autocast, else in that of x.
    """

    bias: nn.Parameter | None
    floats: torch.Tensor | None
    """W [O, K], where it is kept; no parameter or buffer, so that nobody saves or shards it."""

    def __init__(self, layout: Layout, bias: nn.Parameter | None, device: torch.device) -> None:
        super().__init__()
        self.layout = layout
        self.out_features, self.in_features = layout.shape
        for name, size in layout.sizes.items():
            data = torch.empty(size, dtype=torch.uint8, device=device)
            self.register_parameter(name, nn.Parameter(data, requires_grad=False))
        self.bias = bias
        self.floats = None

    @torch.no_grad()
    def keep_floats(self, dtype: torch.dtype) -> None:
        """Dequantise W once, for all uses in that dtype, from the bytes as they are now."""
        self.floats = self.frozen_weight().dequantize(dtype)

    def frozen_weight(self) -> ByteWeight:
        """W over the parameters as they are now."""
        parts = tuple(self.get_parameter(name) for name in self.layout.sizes)
        return ByteWeight(self.layout, parts, self.floats)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., O]."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = self.frozen_weight()
        y: torch.Tensor = apply(_FrozenLinear, x, bias, weight.layout, weight.floats, *weight.parts)
        return y

    def extra_repr(self) -> str:
        """Shown in the printed model."""
        return f"{self.in_features}, {self.out_features}, {self.layout}"


class _FrozenLinear(torch.autograd.Function):
    """x W^T + b; keeps bytes for the backward, which dequantises them again."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        layout: Layout,
        floats: torch.Tensor | None,
        *parts: torch.Tensor,
    ) -> torch.Tensor:
        """[..., K] -> [..., O]."""
        ctx.save_for_backward(*parts)
        ctx.layout, ctx.floats = layout, floats
        return F.linear(x, ByteWeight(layout, parts, floats).dequantize(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and of the bias."""
        # Read once, and also where no gradient needs it: recomputation counts who reads.
        parts = ctx.saved_tensors
        dx = dbias = None
        if ctx.needs_input_grad[0]:
            dx = dy @ ByteWeight(ctx.layout, parts, ctx.floats).dequantize(dy.dtype)
        if ctx.needs_input_grad[1]:
            dbias = dy.flatten(0, -2).sum(dim=0)
        return dx, dbias, None, None, *[None] * len(parts)
