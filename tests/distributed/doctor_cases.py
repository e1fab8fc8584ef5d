"""What ranks of the tests do to look like nodes of their own, and to be ill in one way each."""

from __future__ import annotations

import os
import socket
import time
from contextlib import AbstractContextManager
from pathlib import Path
from unittest import mock

from dtune.doctor import shared
from dtune.doctor.cluster import ClusterSettings, Examined, examine
from dtune.doctor.places import rank_map
from dtune.runtime.world import World


def _node(world: World) -> AbstractContextManager[object]:
    """Around what this rank does as the only one of its node."""
    names = {"GROUP_RANK": str(world.rank), "SLURMD_NODENAME": f"n{world.rank + 1}"}
    return mock.patch.dict(os.environ, names)


def healthy(world: World, *, folder: str) -> Examined:
    """Every check on two nodes."""
    with _node(world):
        return examine(world, ClusterSettings(folder=folder, size_mib=1), Path("no log of NCCL"))


def skewed(world: World, *, folder: str, seconds: float) -> Examined:
    """The clock of the second node is ahead."""
    ahead = seconds if world.rank == 1 else 0.0
    now = time.time

    def shifted() -> float:
        return now() + ahead

    with mock.patch.object(time, "time", shifted):
        return healthy(world, folder=folder)


def own_folders(world: World, *, folder: str) -> list[shared.Sight]:
    """Each node has a folder of its own under the name of the shared one."""
    mine = Path(folder, f"disk-{world.rank}")
    with _node(world):
        return shared.check_folder(world, rank_map(world), mine, size=1024, wait=0.2)


def walled(world: World) -> list[str]:
    """The second node takes no connection."""
    with _node(world):
        places = rank_map(world)
    if world.rank == 0:
        return shared.unreachable(world, places)
    with mock.patch.object(socket.socket, "listen", return_value=None):
        return shared.unreachable(world, places)
