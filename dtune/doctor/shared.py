"""What nodes share: a folder, and ports."""

from __future__ import annotations

import os
import secrets
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from dtune.doctor.places import Place, first_of_nodes
from dtune.runtime.world import World

_CONNECT_SECONDS = 3.0


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
