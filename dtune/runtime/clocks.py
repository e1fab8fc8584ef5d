"""The clocks of the hosts of a run, compared over the network."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dtune.runtime.logs import log
from dtune.runtime.world import World

LARGEST_SKEW = 1.0
"""Seconds: beyond it times of files and logs mislead."""

_ROUNDS = 20


@dataclass(frozen=True)
class Clock:
    """How far a host's clock is from the first rank's."""

    rank: int
    seconds: float
    """Positive: ahead."""
    error: float
    """Half of the fastest round trip: what the offset is known to."""


def clock_offsets(world: World, ranks: Sequence[int]) -> list[Clock]:
    """Of these ranks, one of each host but the first; only on the first rank. Collective.

    Cristian's algorithm: of several round trips the fastest, whose middle is when the other clock
    was read.
    """
    found = []
    for rank in ranks:
        if world.is_first:
            found.append(_ask(world, rank))
        elif world.rank == rank:
            _answer(world)
    world.barrier()
    return found


def warn_of_clocks(world: World) -> None:
    """Name each host whose clock is further from the first one's than LARGEST_SKEW; collective.

    No reason to refuse a run: what is trained does not hang on it.
    """
    hosts = world.gather(socket.gethostname())
    first_ranks = sorted(hosts.index(host) for host in set(hosts))
    for clock in clock_offsets(world, first_ranks[1:]) if len(first_ranks) > 1 else ():
        if abs(clock.seconds) > LARGEST_SKEW:
            log.warning(
                "the clock of %s is %+.1f s from that of %s: run ntp or chrony on both; until "
                "then times in logs mislead, and so do ages of files, as of the run's status",
                hosts[clock.rank],
                clock.seconds,
                hosts[0],
            )


def _ask(world: World, rank: int) -> Clock:
    trips = []
    for _ in range(_ROUNDS):
        theirs = torch.zeros(1, dtype=torch.float64)
        start = time.time()
        dist.send(theirs, rank, group=world.host)
        dist.recv(theirs, rank, group=world.host)
        end = time.time()
        trips.append((end - start, theirs.item() - (start + end) / 2))
    trip, offset = min(trips)
    return Clock(rank, offset, trip / 2)


def _answer(world: World) -> None:
    for _ in range(_ROUNDS):
        ours = torch.zeros(1, dtype=torch.float64)
        dist.recv(ours, 0, group=world.host)
        ours.fill_(time.time())
        dist.send(ours, 0, group=world.host)
