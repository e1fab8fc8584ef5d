"""Where ranks are: the map that every other check of a cluster goes by."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from dataclasses import dataclass

import torch

from dtune.runtime.world import World


@dataclass(frozen=True)
class Place:
    """One rank: on which node, on which device, and by which address it talks."""

    rank: int
    local_rank: int
    node: str
    """The scheduler's name of the node, or the host's."""
    number: int
    """Of the node among the nodes."""
    device: str
    address: str
    """Of the interface by which the first rank is reached."""
    interface: str


def rank_map(world: World) -> list[Place]:
    """Every rank's place, in order of ranks; collective."""
    address = own_address(os.environ.get("MASTER_ADDR", "127.0.0.1"))
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"
    host = socket.gethostname()
    number = int(os.environ.get("GROUP_RANK", os.environ.get("SLURM_NODEID", "0")))
    return world.gather(
        Place(
            rank=world.rank,
            local_rank=world.local_rank,
            node=os.environ.get("SLURMD_NODENAME", host),
            number=number,
            device=device,
            address=address,
            interface=interface_of(address),
        )
    )


def first_of_nodes(places: list[Place]) -> list[Place]:
    """The first rank of each node, in order of ranks."""
    first: dict[int, Place] = {}
    for place in places:
        first.setdefault(place.number, place)
    return list(first.values())


def own_address(towards: str) -> str:
    """This host's address on the way to another; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """Name of the interface that has an address; ``?`` where none of them says so."""
    get_address = 0x8915  # SIOCGIFADDR of netdevice(7)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe.fileno(), get_address, request)
            except OSError:
                continue  # An interface without an address.
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return "?"
