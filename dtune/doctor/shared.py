"""What nodes share: time, a folder, and ports."""

from __future__ import annotations

import os
import secrets
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from dtune.doctor.places import Place, first_of_nodes
from dtune.runtime.world import World

LARGEST_SKEW = 1.0
"""Seconds: beyond it times of files and logs mislead."""

_ROUNDS = 20
_CONNECT_SECONDS = 3.0


@dataclass(frozen=True)
class Clock:
    """How far a node's clock is from the first rank's."""

    rank: int
    seconds: float
    """Positive: ahead."""
    error: float
    """Half of the fastest round trip: what the offset is known to."""


def clock_offsets(world: World, places: list[Place]) -> list[Clock]:
    """Of the first rank of every node but the first; only on the first rank. Collective.

    Cristian's algorithm: of several round trips the fastest, whose middle is when the other clock
    was read.
    """
    found = []
    for place in first_of_nodes(places)[1:]:
        if world.is_first:
            found.append(_ask(world, place.rank))
        elif world.rank == place.rank:
            _answer(world)
    world.barrier()
    return found


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


@dataclass(frozen=True)
class Sight:
    """What one node found of a folder."""

    rank: int
    problem: str
    """Empty where it wrote, and saw the files of all others."""
    megabytes_per_second: float
    seconds_to_see: float


def check_folder(
    world: World, places: list[Place], folder: Path, *, size: int, wait: float
) -> list[Sight]:
    """Each node writes ``size`` bytes into a folder, flushed, and looks for what others wrote.

    It waits ``wait`` seconds at most, as a network file system may lag. Nothing stays. Collective.
    """
    token = world.broadcast(secrets.token_hex(4))
    mine = folder / f".dtune-doctor-{token}"
    firsts = [place.rank for place in first_of_nodes(places)]
    speed, problem = 0.0, ""
    if world.rank in firsts:
        speed, problem = _write(mine, world.rank, size)
    world.barrier()
    seconds = 0.0
    if world.rank in firsts and not problem:
        seconds, problem = _look(mine, firsts, size, wait)
    sights = world.gather(Sight(world.rank, problem, speed, seconds))
    if world.rank in firsts:
        _clean(mine, world.rank)
    return [sights[rank] for rank in firsts]


def _write(folder: Path, rank: int, size: int) -> tuple[float, str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        with open(folder / f"rank-{rank}", "wb") as file:
            file.write(os.urandom(1) * size)
            file.flush()
            os.fsync(file.fileno())
        return size / 1e6 / (time.perf_counter() - start), ""
    except OSError as error:
        return 0.0, f"cannot write {folder.parent}: {error.strerror}"


def _look(folder: Path, ranks: list[int], size: int, wait: float) -> tuple[float, str]:
    start = time.monotonic()
    while True:
        unseen = [rank for rank in ranks if not _is_whole(folder / f"rank-{rank}", size)]
        waited = time.monotonic() - start
        if not unseen:
            return waited, ""
        if waited > wait:
            return waited, (
                f"does not see what {', '.join(f'rank {rank}' for rank in unseen)} wrote to "
                f"{folder.parent} after {wait:.0f} s: not a folder that nodes share"
            )
        time.sleep(0.05)


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _clean(folder: Path, rank: int) -> None:
    (folder / f"rank-{rank}").unlink(missing_ok=True)
    with suppress(OSError):  # Another node's file is still there; that node removes the folder.
        folder.rmdir()


def unreachable(world: World, places: list[Place]) -> list[str]:
    """A line for each node that cannot open a connection to a port of another. Collective."""
    firsts = {place.rank: place for place in first_of_nodes(places)}
    with closing(socket.socket()) as listener:
        port = 0
        if world.rank in firsts:
            listener.bind(("", 0))
            listener.listen(len(firsts))
            port = listener.getsockname()[1]
        ports = world.gather(port)
        failed: list[str] = []
        if world.rank in firsts:
            others = [place for rank, place in firsts.items() if rank != world.rank]
            with ThreadPoolExecutor(max_workers=16) as pool:
                said = pool.map(lambda place: _connect(place, ports[place.rank]), others)
                failed = [f"{firsts[world.rank].node} {line}" for line in said if line]
        every = [line for lines in world.gather(failed) for line in lines]
    return every


def _connect(place: Place, port: int) -> str:
    try:
        with socket.create_connection((place.address, port), timeout=_CONNECT_SECONDS):
            return ""
    except OSError as error:
        why = error.strerror or str(error)
        return (
            f"cannot reach {place.node} at {place.address}:{port} ({why}): a firewall, or an "
            "interface that other nodes do not see (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
        )
