"""The measured ceiling: what a device reaches in the model's own matrix products alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from dtune.bench.timing import synchronize
from dtune.types import LinearLike, ModelSpec

Shapes = Mapping[tuple[int, int], int]
"""(in_features, out_features) of a linear -> how many the model has."""

_LEAST_REPEATS = 3


@dataclass(frozen=True)
class Ceiling:
    """FLOP/s of one device over products of these shapes, each as often as in a step."""

    flops: float
    rows: int
    """Tokens of a micro batch: rows of every product."""
    dtype: torch.dtype


def linear_shapes(model: nn.Module, spec: ModelSpec) -> Shapes:
    """Shapes of the base's linears, before or after they became bytes."""
    counts: Counter[tuple[int, int]] = Counter()
    for path in spec.linears:
        linear = model.get_submodule(path)
        if isinstance(linear, LinearLike):
            counts[linear.in_features, linear.out_features] += 1
    return counts


def measure_ceiling(
    shapes: Shapes, *, rows: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> Ceiling:
    """Multiply random matrices of every shape for about ``seconds`` in all.

    A shape takes part by its share of the FLOPs of a step: the rate is that of all products of a
    step after one another, forward (rows x in) (in x out) alone.
    """
    assert shapes, "the model has no linears"
    total = sum(fan_in * fan_out * count for (fan_in, fan_out), count in shapes.items())
    spent = 0.0
    for (fan_in, fan_out), count in shapes.items():
        share = fan_in * fan_out * count / total
        each = _time_product(rows, fan_in, fan_out, dtype, device, seconds * share)
        spent += each * count
    return Ceiling(2.0 * rows * total / spent, rows, dtype)


def _time_product(
    rows: int, fan_in: int, fan_out: int, dtype: torch.dtype, device: torch.device, seconds: float
) -> float:
    """Seconds of one product, repeated for about ``seconds``."""
    x = torch.randn(rows, fan_in, device=device, dtype=dtype)
    weight = torch.randn(fan_out, fan_in, device=device, dtype=dtype)
    out = torch.empty(rows, fan_out, device=device, dtype=dtype)
    once = _run(x, weight, out, _LEAST_REPEATS) / _LEAST_REPEATS
    repeats = max(_LEAST_REPEATS, int(seconds / once))
    return _run(x, weight, out, repeats) / repeats


def _run(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, repeats: int) -> float:
    transposed = weight.t()
    torch.mm(x, transposed, out=out)
    synchronize(x.device)
    began = time.perf_counter()
    for _ in range(repeats):
        torch.mm(x, transposed, out=out)
    synchronize(x.device)
    return time.perf_counter() - began
