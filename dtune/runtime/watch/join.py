"""The watchers of all ranks meet over the process group."""

from __future__ import annotations

import os
import secrets
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from dtune.runtime.watch.client import Watch
from dtune.runtime.world import World


def join_watchers(watch: Watch, world: World) -> None:
    """Let the watchers of all ranks know each other, and count collective calls; collective.

    Then a rank that hangs is named, and one that fails ends the others.
    """
    if world.size == 1:
        watch.meet(1)
        return
    secret = world.broadcast(secrets.token_hex(16) if world.is_first else "")
    # Its own machine alone may call where all ranks are on it.
    own = watch.listen(local=world.local_size == world.size) if world.is_first else 0
    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
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
