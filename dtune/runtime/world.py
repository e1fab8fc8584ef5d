"""The ranks of a run: who this process is, and what ranks agree on."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from dtune.errors import HungError

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
    def start(cls, timeout: timedelta | None = None) -> World:
        """Join the process group that torchrun's variables describe, or make one of size 1.

        ``timeout`` is of collective calls and of the wait for the other ranks; None: torch's own.
        """
        rank = int(os.environ.get("RANK", "0"))
        size = int(os.environ.get("WORLD_SIZE", "1"))
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if torch.cuda.is_available():
            # Slurm may show each task its own GPU alone.
            alone = "DTUNE_SRUN" in os.environ and torch.cuda.device_count() == 1
            device = torch.device("cuda", 0 if alone else local_rank)
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        else:
            device = torch.device("cpu")
            backend = "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(
                backend, timeout=timeout, store=HashStore(), rank=0, world_size=1
            )
        host = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
        return cls(rank, size, local_rank, local_size, device, host)

    def allow(self, timeout: timedelta) -> None:
        """Let collective calls of all groups that there are take so long; ``host`` longer still."""
        for group in list(_world.pg_names):
            _set_pg_timeout(max(timeout, HOST_TIMEOUT) if group is self.host else timeout, group)

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

    def largest(self, number: int) -> int:
        """The largest of what the ranks gave."""
        if self.size == 1:
            return number
        vote = torch.tensor(number)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=self.host)
        return int(vote.item())

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

    def meet(self, seconds: float) -> None:
        """A barrier over gloo that names who does not come within ``seconds``; 0: waits for ever.

        Raises HungError on the first rank, of rank -1 where torch does not say who it was. On the
        others, which only hear that the first has given up, what is raised says a peer is lost.
        """
        if self.size == 1:
            return
        limit = seconds or HOST_TIMEOUT.total_seconds()
        began = time.monotonic()
        try:
            dist.monitored_barrier(
                group=self.host, timeout=timedelta(seconds=limit), wait_all_ranks=True
            )
        except RuntimeError as error:
            missing = re.search(r"Ranks? ([\d, ]+) failed to pass monitoredBarrier", str(error))
            if missing is None and (not self.is_first or time.monotonic() - began < limit):
                raise
            who = missing.group(1).strip(" ,") if missing else ""
            raise HungError(
                f"hung: {f'rank {who}' if who else 'a rank'} did not come to the barrier of all "
                f"ranks within {limit:.0f} s (watch.step)",
                rank=int(who.split(",")[0]) if who else -1,
            ) from error

    def stop(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()
