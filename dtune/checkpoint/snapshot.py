"""A state that training no longer changes: copied to host memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from dtune.checkpoint.manifest import Identity
from dtune.types import FlatShard


@dataclass(frozen=True)
class HostRange:
    """A range of a tensor, in host memory."""

    name: str
    start: int
    values: torch.Tensor


@dataclass(frozen=True)
class Snapshot:
    """Everything that one rank writes of one step."""

    step: int
    ranges: list[HostRange]
    shapes: Mapping[str, tuple[int, ...]]
    """Of every tensor that this rank knows, whoever saves it."""
    dtypes: Mapping[str, torch.dtype]
    rng: Mapping[str, torch.Tensor]
    state: bytes
    """Contents of ``state.json``."""
    identity: Identity
    best_step: int
    """Step of the best checkpoint so far; -1: none."""


class HostBuffers:
    """Host memory that every save uses again; pinned where the values come from a GPU.

    Making pinned memory takes longer than the copy into it.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    def copy(self, shards: Iterable[FlatShard]) -> list[HostRange]:
        """Copy what this rank saves; what an earlier call returned is overwritten."""
        kept: dict[tuple[str, int], torch.Tensor] = {}
        devices: set[torch.device] = set()
        for shard in shards:
            if not shard.saved_here or not shard.local.numel():
                continue
            key = (shard.name, shard.start)
            assert key not in kept, key
            kept[key] = self._buffer(key, shard.local)
            kept[key].copy_(shard.local.detach(), non_blocking=True)
            devices.add(shard.local.device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        self._buffers = kept
        return [HostRange(name, start, values) for (name, start), values in kept.items()]

    def _buffer(self, key: tuple[str, int], like: torch.Tensor) -> torch.Tensor:
        old = self._buffers.get(key)
        if old is not None and old.shape == like.shape and old.dtype == like.dtype:
            return old
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
