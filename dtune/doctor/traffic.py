"""How fast ranks talk, node by node and pair by pair, and over what."""

from __future__ import annotations

import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
import torch.distributed as dist

from dtune.doctor.places import Place, first_of_nodes
from dtune.runtime.world import World

MOST_NODES_IN_PAIRS = 8
"""Above it, only neighbours are measured: all pairs of 64 nodes are 2,016."""

SLOW = 0.5
"""Share of the median below which a pair is called slow."""

_WARM_UP, _ROUNDS = 2, 5


@dataclass(frozen=True)
class Speed:
    """Bus bandwidth between some ranks, in 10^9 bytes/s: what a link carries in one direction."""

    between: str
    ranks: int
    all_reduce: float
    all_gather: float


def measure(world: World, places: list[Place], size: int) -> list[Speed]:
    """Every node by itself, pairs of nodes, then all; ``size`` bytes a rank. Collective."""
    nodes: dict[int, list[Place]] = {}
    for place in places:
        nodes.setdefault(place.number, []).append(place)
    names = {number: node_name(number, places) for number in nodes}
    groups = [
        (f"in {names[number]}", [place.rank for place in members])
        for number, members in nodes.items()
        if len(members) > 1
    ]
    groups += [
        (
            f"{names[one]} - {names[two]}",
            [place.rank for number in (one, two) for place in nodes[number]],
        )
        for one, two in pairs(list(nodes))
    ]
    if len(nodes) > 2:
        groups.append((f"all {len(nodes)} nodes", [place.rank for place in places]))
    found = [_speed(world, name, ranks, size) for name, ranks in groups]
    return [speed for speed in found if speed is not None]


def node_name(number: int, places: list[Place]) -> str:
    """Name of a node; with its number where two have the same."""
    firsts = first_of_nodes(places)
    name = next(place.node for place in firsts if place.number == number)
    twice = sum(place.node == name for place in firsts) > 1
    return f"{name}#{number}" if twice else name


def pairs(nodes: list[int]) -> list[tuple[int, int]]:
    """Pairs of nodes that are measured: all of a few, the ring of many."""
    if len(nodes) <= MOST_NODES_IN_PAIRS:
        return list(combinations(nodes, 2))
    return list(zip(nodes, [*nodes[1:], nodes[0]], strict=True))


def _speed(world: World, name: str, ranks: list[int], size: int) -> Speed | None:
    """On every rank of the group; None on ranks that are not in it, which it leaves out below."""
    group = dist.new_group(ranks)  # Every rank makes every group, in the same order.
    mine = None
    if world.rank in ranks:
        count, elements = len(ranks), size // 4
        whole = torch.zeros(elements, device=world.device)
        part = torch.zeros(elements // count, device=world.device)
        gathered = torch.empty(part.numel() * count, device=world.device)
        reduce_seconds = _median(world, lambda: dist.all_reduce(whole, group=group))
        with warnings.catch_warnings():
            # Its new name is not in every torch that dtune runs with.
            warnings.simplefilter("ignore", FutureWarning)
            gather_seconds = _median(
                world, lambda: dist.all_gather_into_tensor(gathered, part, group=group)
            )
        # Rabenseifner: each byte crosses a link 2 (n-1)/n times to be reduced, (n-1)/n to be
        # gathered.
        crossed = (count - 1) / count * 1e-9
        mine = Speed(
            name,
            count,
            2 * whole.nbytes * crossed / reduce_seconds,
            gathered.nbytes * crossed / gather_seconds,
        )
    every = [speed for speed in world.gather(mine) if speed is not None]
    # What the slowest of its ranks has seen.
    return min(every, key=lambda speed: speed.all_reduce, default=None)


def _median(world: World, act: Callable[[], object]) -> float:
    """Median seconds of a collective on this rank."""
    seconds = []
    for number in range(_WARM_UP + _ROUNDS):
        start = time.perf_counter()
        act()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        if number >= _WARM_UP:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def slow_pairs(speeds: Iterable[Speed]) -> list[str]:
    """A line for each pair of nodes that is far slower than the others."""
    between = [speed for speed in speeds if " - " in speed.between]
    if len(between) < 3:
        return []  # Of two, nothing says which one is wrong.
    usual = statistics.median(speed.all_reduce for speed in between)
    return [
        f"{speed.between}: all-reduce at {speed.all_reduce:.2f} GB/s where {usual:.2f} is usual; "
        "leave one of the two nodes out (sbatch --exclude) to see which it is"
        for speed in between
        if speed.all_reduce < SLOW * usual
    ]


def rdma_devices(root: Path = Path("/sys/class/infiniband")) -> list[str]:
    """Ports of RDMA devices that are up, with their rate: ``mlx5_0/1 400 Gb/sec (4X NDR)``."""
    if not root.is_dir():
        return []
    found = []
    for port in sorted(root.glob("*/ports/*")):
        state = (port / "state").read_text().strip()
        if state.endswith("ACTIVE"):
            rate = (port / "rate").read_text().strip()
            found.append(f"{port.parent.parent.name}/{port.name} {rate}")
    return found


def network_of_nccl(log: str) -> str:
    """What NCCL says it uses between nodes: ``IB``, ``Socket``, a plugin's name; empty: nothing."""
    used = re.findall(r"Using network (\S+)", log)
    return used[-1] if used else ""


def verdict(network: str, devices: list[str], interfaces: list[str]) -> tuple[str, str]:
    """What ranks talk over, and what is wrong with that; the latter empty where nothing is."""
    if network in ("", "gloo"):
        return f"gloo over TCP sockets of {', '.join(interfaces)}", ""
    if network != "Socket":
        return f"NCCL over {network}", ""
    said = f"NCCL over TCP sockets of {', '.join(interfaces)}"
    if not devices:
        return said, ""
    return said, (
        f"NCCL talks over sockets although RDMA is up ({'; '.join(devices)}): look at NCCL_IB_HCA, "
        "NCCL_IB_DISABLE and NCCL_NET, and whether a container hides /dev/infiniband"
    )
