"""The ranks of a run: who this process is, and what ranks agree on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

T = TypeVar("T")

# Ranks may wait this long for one that tokenises or writes; NCCL's own limit is not involved,
# because what waits goes over gloo.
HOST_TIMEOUT = timedelta(hours=6)


@dataclass(frozen=True)
class World:
    """This process among all. One process is a world of size 1, with a process group as well.

    CPU tensors are reduced over gloo, CUDA tensors over NCCL. ``host`` is a gloo group of its own
    for votes and waiting, so that a stuck device cannot block a decision.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    host: dist.ProcessGroup

    @classmethod
    def start(cls) -> World:
        """Join the process group that torchrun's variables describe, or make one of size 1."""
        rank = int(os.environ.get("RANK", "0"))
        size = int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if torch.cuda.is_available():
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        else:
            device = torch.device("cpu")
            backend = "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        host = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
        return cls(rank, size, local_rank, local_size, device, host)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of a tensor on ``device`` over all ranks; a new tensor, no host sync."""
        total = value.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def all_agree(self, ok: bool) -> bool:
        """Whether ``ok`` is true on every rank."""
        if self.size == 1:
            return ok
        vote = torch.tensor(int(ok))
        dist.all_reduce(vote, op=dist.ReduceOp.MIN, group=self.host)
        return bool(vote.item())

    def any_says(self, yes: bool) -> bool:
        """Whether ``yes`` is true on at least one rank."""
        return not self.all_agree(not yes)

    def gather(self, value: T) -> list[T]:
        """What every rank gave, in order of ranks, on every rank. Picklable values of our own."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.host)
        return values

    def broadcast(self, value: T) -> T:
        """What the first rank gave."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host)
        return box[0]

    def barrier(self) -> None:
        """Wait for every rank, over gloo."""
        if self.size > 1:
            dist.barrier(group=self.host)

    def stop(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()
