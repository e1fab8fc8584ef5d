"""Linears with adapters for tests, and what they compute, written out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from dtune_kernels.lora import Adapter, Linear, Norm
from dtune_kernels.lora.dropout import kept

EPS = 1e-6
SCALE = 2.5


def linear(
    outputs: int, inputs: int, ranks: Sequence[int] = (), *, bias: bool = False, dropout: float = 0
) -> Linear:
    """A random linear whose outputs, and those of its adapters, are about 1."""
    adapters = tuple(
        Adapter(
            torch.randn(rank, inputs) / inputs**0.5,
            torch.randn(outputs, rank) / rank**0.5 / SCALE,
            SCALE + index,
            dropout,
        )
        for index, rank in enumerate(ranks)
    )
    weight = torch.randn(outputs, inputs) / inputs**0.5
    return Linear(weight, torch.randn(outputs) if bias else None, adapters)


def cast(one: Linear, dtype: torch.dtype, *, train_bias: bool = True) -> Linear:
    """A copy in a dtype, with leaves; adapters stay in fp32 beside 16 bits."""
    wide = torch.promote_types(dtype, torch.float32)
    assert isinstance(one.weight, torch.Tensor)
    bias = None if one.bias is None else leaf(one.bias, dtype, train=train_bias)
    adapters = tuple(
        replace(each, a=leaf(each.a, wide), b=leaf(each.b, wide)) for each in one.adapters
    )
    return Linear(one.weight.detach().to(dtype), bias, adapters)


def rounded(one: Linear, dtype: torch.dtype) -> Linear:
    """The linear with a base that the dtype can have."""
    assert isinstance(one.weight, torch.Tensor)
    bias = None if one.bias is None else one.bias.to(dtype)
    return replace(one, weight=one.weight.to(dtype), bias=bias)


def leaf(x: torch.Tensor, dtype: torch.dtype, *, train: bool = True) -> torch.Tensor:
    """A copy of a tensor in a dtype, with its strides, that gathers a gradient."""
    return x.detach().to(dtype, copy=True).requires_grad_(train)


def leaves(linears: Sequence[Linear]) -> list[torch.Tensor]:
    """Everything that is trained."""
    found = []
    for one in linears:
        found += [one.bias] if one.bias is not None and one.bias.requires_grad else []
        found += [x for each in one.adapters for x in (each.a, each.b) if x.requires_grad]
    return found


def masks(seed: torch.Tensor | None, linears: Sequence[Linear], rows: int) -> list[torch.Tensor]:
    """The mask of each adapter of a group, divided by what is kept."""
    found: list[torch.Tensor] = []
    for one in linears:
        for each in one.adapters:
            columns = each.a.shape[1]
            mask = torch.ones(rows, columns, dtype=torch.double)
            if each.dropout:
                assert seed is not None
                mask = kept(seed, len(found), rows, columns, each.dropout) / (1 - each.dropout)
            found.append(mask)
    return found


def drawn(seed: int, count: int = 1) -> torch.Tensor:
    """What a call draws after ``manual_seed``, which is left at the start again."""
    torch.manual_seed(seed)
    found = torch.randint(0, 2**63 - 1, (count,), dtype=torch.int64)
    torch.manual_seed(seed)
    return found


def formula(
    x: torch.Tensor, linears: Sequence[Linear], scaled_masks: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """PEFT's forward in the dtype of x: each result rounded to it."""
    ys = []
    remaining = iter(scaled_masks)
    for one in linears:
        assert isinstance(one.weight, torch.Tensor)
        y = F.linear(x, one.weight, one.bias)
        for each in one.adapters:
            dropped = x * next(remaining).to(x.dtype).view(x.shape)
            down = F.linear(dropped, each.a.to(x.dtype))
            y = y + F.linear(down, each.b.to(x.dtype)) * each.scale
        ys.append(y)
    return ys


def norm_formula(h: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """Hugging Face's RMSNorm."""
    if norm is None:
        return h
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    if norm.gemma:
        return (normed * (1.0 + norm.weight.to(wide.dtype))).to(h.dtype)
    return norm.weight * normed.to(h.dtype)


@dataclass(frozen=True)
class HalfWeight:
    """A weight kept as bytes: two tensors whose sum it is."""

    shape: tuple[int, int]
    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor) -> Self:
        """Keep the weight as fp16 and what is left."""
        high = weight.half()
        rows, columns = weight.shape
        return cls((rows, columns), (weight - high.to(weight.dtype)), high)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, as it was."""
        return (self.low + self.high.to(self.low.dtype)).to(dtype)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Both halves."""
        return self.low, self.high

    def with_tensors(self, tensors: tuple[torch.Tensor, ...]) -> Self:
        """Others in their place."""
        return replace(self, low=tensors[0], high=tensors[1])
