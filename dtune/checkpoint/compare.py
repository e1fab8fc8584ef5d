"""Whether two checkpoints hold the same, to the bit, and where they first differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load_file

from dtune.checkpoint.layout import rng_file
from dtune.checkpoint.reader import CheckpointInfo, CheckpointSource
from dtune.types import TensorSource

_PIECE = 1 << 22


def find_differences(one: CheckpointInfo, other: CheckpointInfo) -> Iterator[str]:
    """A line for each thing that differs: tensors, scalars, the trainer's state, generators."""
    yield from _compare_values("ranks", one.manifest.world_size, other.manifest.world_size)
    yield from _compare_values("step", one.step, other.step)
    yield from _compare_tensors(one, other)
    yield from _compare_values("scalars", dict(one.scalars), dict(other.scalars))
    yield from _compare_values("state", dict(one.extra), dict(other.extra))
    for rank in range(min(one.manifest.world_size, other.manifest.world_size)):
        states = load_file(one.path / rng_file(rank)), load_file(other.path / rng_file(rank))
        for name in sorted(states[0].keys() | states[1].keys()):
            before, after = states[0].get(name), states[1].get(name)
            if before is None or after is None or not torch.equal(_bits(before), _bits(after)):
                yield f"generator {name} of rank {rank} stands elsewhere"


def _compare_tensors(one: CheckpointInfo, other: CheckpointInfo) -> Iterator[str]:
    sources = CheckpointSource(one), CheckpointSource(other)
    for name in sorted(one.tensors.keys() | other.tensors.keys()):
        facts = [
            (info.tensors[name].shape, info.tensors[name].dtype) if name in info.tensors else None
            for info in (one, other)
        ]
        if facts[0] != facts[1]:
            yield f"{name} is {facts[0]} and {facts[1]}"
        elif said := _first_difference(name, *sources, math.prod(one.tensors[name].shape)):
            yield said


def _first_difference(name: str, one: TensorSource, other: TensorSource, total: int) -> str:
    """Where a tensor first differs, and in how many of its elements; empty where it does not."""
    count, first = 0, ""
    for start in range(0, total, _PIECE):
        stop = min(start + _PIECE, total)
        values = one.read(name, start, stop), other.read(name, start, stop)
        apart = (_bits(values[0]) != _bits(values[1])).view(stop - start, -1).any(dim=1)
        found = int(apart.sum())
        if found and not count:
            at = int(apart.nonzero()[0])
            first = f"element {start + at}: {values[0][at].item()!r} and {values[1][at].item()!r}"
        count += found
    return f"{name} differs in {count} of {total} elements, first {first}" if count else ""


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8)


def _compare_values(name: str, one: Any, other: Any) -> Iterator[str]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in sorted(one.keys() | other.keys(), key=str):
            yield from _compare_values(f"{name}.{key}", one.get(key), other.get(key))
    elif one != other:
        yield f"{name} is {one!r} and {other!r}"
