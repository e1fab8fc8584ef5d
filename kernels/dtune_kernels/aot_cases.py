"""What the ops of the catalog launch for real layers: the cases that are compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from dtune_kernels.catalog import LLAMA_1B, LLAMA_8B, LLAMA_70B, Op, Shape
from dtune_kernels.errors import KernelArgumentError
from dtune_kernels.launch import Launch, recorded

META = torch.device("meta")
EDGE = Shape("edge", 1, hidden=24, ffn=40, heads=3, kv_heads=1, head_dim=8, vocab=50, rank=1)
"""Sizes of 1, which Triton makes constants of; it must compile, and need not be fast."""
CHOICES = {"activation": ("silu", "gelu", "gelu_tanh"), "kind": ("nf4", "fp4")}
"""Values of arguments that are strings, by name."""

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Planned:
    """A launch that an op makes for a layer."""

    op: str
    case: str
    """Layer, dtype and what else differs from the catalog's arguments."""
    launch: Launch
    results: int
    """Elements of the op's first result."""
    itemsize: int
    """Bytes of one of them."""


def plan(op: Op) -> Iterator[Planned]:
    """Launch an op on meta tensors, for each layer, dtype and switch that is compiled.

    1B, 8B and 70B layers in bf16, 8B in fp32, ``EDGE``, and ranks 64 and 1 of adapters. Each
    switch alone, on the 8B layer in bf16: boolean arguments the other way; every other value of
    ``CHOICES``; 0.5 for all numbers that are 0.0, together; dropout. What an op refuses with
    KernelArgumentError is not compiled.
    """
    for case, shape, dtype in _cases(op.name):
        arguments = op.arguments(shape, dtype, META)
        yield from _planned(op, case, arguments)
        if shape.name == LLAMA_8B.name and dtype == torch.bfloat16:
            for switch, switched in _switched(op, arguments):
                yield from _planned(op, f"{case} {switch}", switched)


def _cases(op: str) -> Iterator[tuple[str, Shape, torch.dtype]]:
    for shape in (LLAMA_8B, LLAMA_1B, LLAMA_70B):
        yield f"{shape.name} bf16", shape, torch.bfloat16
    if op.startswith(("lora", "dora")):
        for rank in (64, 1):
            yield f"8b bf16 r{rank}", replace(LLAMA_8B, rank=rank), torch.bfloat16
    yield "8b fp32", LLAMA_8B, torch.float32
    yield EDGE.name, EDGE, torch.bfloat16


def _switched(op: Op, arguments: Arguments) -> Iterator[tuple[str, Arguments]]:
    names = [argument.name for argument in op.call._schema.arguments]
    for name, value in zip(names, arguments, strict=True):
        others: tuple[Any, ...] = CHOICES.get(name, ())
        if isinstance(value, bool):
            others = (not value,)
        for other in others:
            if other != value:
                yield f"{name}={other}", _with(names, arguments, {name: other})
    zeros = [n for n, v in zip(names, arguments, strict=True) if isinstance(v, float) and v == 0]
    if zeros:
        yield f"{','.join(zeros)}=0.5", _with(names, arguments, dict.fromkeys(zeros, 0.5))
    if "dropout" in names:
        rates = [0.1] * len(arguments[names.index("dropout")])
        seed = torch.empty(1, dtype=torch.int64, device=META)
        yield "dropout", _with(names, arguments, {"dropout": rates, "seed": seed})


def _with(names: list[str], arguments: Arguments, changes: dict[str, Any]) -> Arguments:
    changed = [changes.get(name, value) for name, value in zip(names, arguments, strict=True)]
    return tuple(changed)


def _planned(op: Op, case: str, arguments: Arguments) -> Iterator[Planned]:
    with recorded() as launches:
        try:
            result = op.triton(*arguments)
        except KernelArgumentError:
            return
    first = result if isinstance(result, torch.Tensor) else next(iter(result or ()), None)
    numel, itemsize = (first.numel(), first.element_size()) if first is not None else (0, 1)
    for launch in launches:
        yield Planned(op.name, case, launch, numel, itemsize)
