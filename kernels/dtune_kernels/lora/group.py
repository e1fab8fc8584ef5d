"""Linears that read one input, forward and backward, from flat tensors.

The base products are PyTorch's; a quantised weight is dequantised for each use and dropped. What
would fuse the two replaces ``_base`` and ``Group.dx``.

Size legend: T tokens, K features in, O features out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dtune_kernels.lora import ops
from dtune_kernels.lora.types import Linear
from dtune_kernels.weights import FrozenWeight, QuantizedWeight

Flat = Sequence[torch.Tensor | None]
"""The tensors of linears: of each its weight's, its bias, and A and B of its adapters."""


@dataclass(frozen=True)
class Member:
    """What of a linear is no tensor."""

    quantized: QuantizedWeight | None
    weight_tensors: int
    scales: tuple[float, ...]
    dropouts: tuple[float, ...]


@dataclass(frozen=True)
class Group:
    """Linears put together again, with the places of their tensors among the flat ones."""

    weights: list[FrozenWeight]
    biases: list[torch.Tensor | None]
    bias_at: list[int]
    a: list[torch.Tensor]
    b: list[torch.Tensor]
    a_at: list[int]
    owner: list[int]
    """Of each adapter its linear."""
    scale: list[float]
    dropout: list[float]

    def forward(
        self, x: torch.Tensor, seed: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Return y [T, O] of each linear, and P."""
        ys = self.base(x)
        p = self.project(x, seed)
        if p is not None:
            adapted, member = self._adapted()
            own = ops.expand([ys[index] for index in adapted], p, self.b, member, self.scale)
            for index, y in zip(adapted, own, strict=True):
                ys[index] = y
        return ys, p

    def base(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return x W^T + bias [T, O] of each linear."""
        return [
            _base(x, weight, bias) for weight, bias in zip(self.weights, self.biases, strict=True)
        ]

    def project(self, x: torch.Tensor, seed: torch.Tensor | None) -> torch.Tensor | None:
        """Return P [T, sum of R] = drop(x) A^T of all adapters; None if there are none."""
        if not self.a:
            return None
        p: torch.Tensor = ops.project(x, self.a, seed, self.dropout)
        return p

    def low_rank_grads(
        self, dys: Sequence[torch.Tensor], p: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Return dS [T, sum of R] and dB of each adapter; None without adapters."""
        if p is None:
            return None, []
        adapted, member = self._adapted()
        ds, db = ops.grad_b([dys[index] for index in adapted], p, self.b, member, self.scale)
        return ds, list(db)

    def dx(
        self, dys: Sequence[torch.Tensor], ds: torch.Tensor | None, seed: torch.Tensor | None
    ) -> torch.Tensor:
        """Return dx [T, K] = sum of dy W + drop(dS A)."""
        dx = self.base_dx(dys)
        if ds is not None:
            transposed = [each.t() for each in self.a]
            ones = [1.0] * len(self.a)
            ops.expand_([dx], ds, transposed, [0] * len(self.a), ones, seed, self.dropout)
        return dx

    def base_dx(self, dys: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the sum of dy W [T, K]."""
        dx = torch.mm(dys[0], _dense(self.weights[0], dys[0].dtype))
        for dy, weight in zip(dys[1:], self.weights[1:], strict=True):
            dx.addmm_(dy, _dense(weight, dy.dtype))
        return dx

    def fill(
        self,
        grads: list[torch.Tensor | None],
        needed: Sequence[bool],
        dys: Sequence[torch.Tensor],
        da: Sequence[torch.Tensor | None],
        db: Sequence[torch.Tensor],
    ) -> None:
        """Put the gradients of biases, A and B at their places among those of the flat tensors."""
        for at, bias, dy in zip(self.bias_at, self.biases, dys, strict=True):
            if bias is not None and needed[at]:
                wide = torch.promote_types(dy.dtype, bias.dtype)
                grads[at] = dy.sum(0, dtype=wide).to(bias.dtype)
        for at, each in zip(self.a_at, da, strict=True):
            grads[at] = each
        for at, each in zip(self.a_at, db, strict=True):
            grads[at + 1] = each

    def _adapted(self) -> tuple[list[int], list[int]]:
        """Return the linears that have adapters, and of each adapter its place among them."""
        adapted = sorted(set(self.owner))
        return adapted, [adapted.index(index) for index in self.owner]


def flatten(linears: Sequence[Linear]) -> tuple[list[torch.Tensor | None], tuple[Member, ...]]:
    """Return the tensors of linears, and what else they are."""
    flat: list[torch.Tensor | None] = []
    members = []
    for linear in linears:
        weight = linear.weight
        quantized = None if isinstance(weight, torch.Tensor) else weight
        tensors = (weight,) if isinstance(weight, torch.Tensor) else weight.tensors()
        flat += [*tensors, linear.bias]
        for adapter in linear.adapters:
            flat += [adapter.a, adapter.b]
        scales = tuple(adapter.scale for adapter in linear.adapters)
        dropouts = tuple(adapter.dropout for adapter in linear.adapters)
        members.append(Member(quantized, len(tensors), scales, dropouts))
    return flat, tuple(members)


def group_of(members: Sequence[Member], flat: Flat, first: int = 0) -> Group:
    """Put linears together from the flat tensors that begin at ``first``."""
    group = Group([], [], [], [], [], [], [], [], [])
    at = first
    for index, member in enumerate(members):
        group.weights.append(_weight(member, flat[at : at + member.weight_tensors]))
        at += member.weight_tensors
        group.biases.append(flat[at])
        group.bias_at.append(at)
        at += 1
        for scale, dropout in zip(member.scales, member.dropouts, strict=True):
            a, b = flat[at], flat[at + 1]
            assert a is not None
            assert b is not None
            group.a.append(a)
            group.b.append(b)
            group.a_at.append(at)
            group.owner.append(index)
            group.scale.append(scale)
            group.dropout.append(dropout)
            at += 2
    return group


def size_of(members: Sequence[Member]) -> int:
    """How many flat tensors the linears have."""
    return sum(member.weight_tensors + 1 + 2 * len(member.scales) for member in members)


def _weight(member: Member, tensors: Flat) -> FrozenWeight:
    kept = tuple(x for x in tensors if x is not None)
    return kept[0] if member.quantized is None else member.quantized.with_tensors(kept)


def _base(x: torch.Tensor, weight: FrozenWeight, bias: torch.Tensor | None) -> torch.Tensor:
    transposed = _dense(weight, x.dtype).t()
    if bias is None:
        return torch.mm(x, transposed)
    return torch.addmm(bias.to(x.dtype), x, transposed)


def _dense(weight: FrozenWeight, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) if isinstance(weight, torch.Tensor) else weight.dequantize(dtype)
