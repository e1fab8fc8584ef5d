"""The watchers of all ranks meet over the process group."""

from __future__ import annotations

import os
import secrets
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from dtune.runtime.watch.client import Watch
from dtune.runtime.watch.heartbeat import longest_gap
from dtune.runtime.watch.schema import WatchConfig
from dtune.runtime.world import HOST_TIMEOUT, World

UNWATCHED = timedelta(hours=1)
"""What a collective call may take where no time-out of steps is set."""


def collective_timeout(config: WatchConfig) -> timedelta:
    """How long a collective call may wait: the watchers decide long before.

    torch's own time-outs, 10 and 30 minutes, would end ranks that wait for one that compiles, and
    name the wrong one. Without ``watch.step`` nobody else ends a run that hangs.
    """
    sections = (config.start, config.first_step, config.step, config.save, config.evaluation)
    longest = timedelta(seconds=2 * max(sections))
    return max(longest, HOST_TIMEOUT if config.step else UNWATCHED)


WATCHERS_FIRST = 15.0
"""Seconds beyond a time-out in which watchers, who say more, decide first."""


def meet_ranks(world: World, config: WatchConfig) -> None:
    """Have all ranks meet within the time-out of a step; HungError names who does not come.

    It also finds a rank that is alive, gives signs of life and does not come. Collective.
    """
    limit = max(config.step, config.step_factor * longest_gap())
    world.meet(limit + WATCHERS_FIRST if config.step else 0.0)


def join_watchers(watch: Watch, world: World) -> None:
    """Let the watchers of all ranks know each other, and count collective calls; collective.

    Then a rank that hangs is named, and one that fails ends the others.
    """
    if world.size == 1:
        watch.meet(1)
        return
    secret = world.broadcast(secrets.token_hex(16) if world.is_first else "")
    # Its own machine alone may call where all ranks are on it.
    local = world.local_size == world.size
    own = watch.listen(local=local) if world.is_first else 0
    address = "127.0.0.1" if local else os.environ["MASTER_ADDR"]
    watch.meet(world.size, address=address, port=world.broadcast(own), secret=secret)
    watch.count(count_calls)


def count_calls() -> dict[str, int]:
    """Collective calls begun by this process, by group and kind of device."""
    if not dist.is_initialized():
        return {}
    calls = {}
    for group, name in list(_world.pg_names.items()):
        for device in group._device_types:
            backend: Any = group._get_backend(torch.device(device))
            calls[f"{name}{device.type[:2]}"] = backend._get_sequence_number_for_group()
    return calls
