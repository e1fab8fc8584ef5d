"""All ranks of an allocation: where they are, how fast they talk, what they share."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dtune.doctor.places import Place, first_of_nodes, rank_map
from dtune.doctor.shared import Sight, check_folder, unreachable
from dtune.doctor.table import columns
from dtune.doctor.traffic import measure, network_of_nccl, rdma_devices, slow_pairs, verdict
from dtune.errors import ConfigError
from dtune.runtime.clocks import LARGEST_SKEW, clock_offsets
from dtune.runtime.world import World

MIB = 2**20


@dataclass
class ClusterSettings:
    """Settings of ``dtune doctor --cluster``."""

    # Folder that all nodes are to see, such as that of your runs.
    folder: str = "."
    # MiB that each rank sends, and each node writes.
    size_mib: int = 64
    # Seconds to wait for a file of another node.
    wait: float = 60.0
    # Processes a node; auto: one a GPU, or 2 where there is none.
    nproc: str = "auto"

    def __post_init__(self) -> None:
        if self.size_mib < 1:
            raise ConfigError(f"size_mib={self.size_mib} must be at least 1")
        if self.wait < 0:
            raise ConfigError(f"wait={self.wait} must be 0 or more")
        if self.nproc != "auto" and not (self.nproc.isdecimal() and int(self.nproc) > 0):
            raise ConfigError(f"nproc={self.nproc} must be auto or a number of processes")


@dataclass(frozen=True)
class Examined:
    """What was found."""

    text: str
    problems: list[str]


def log_nccl() -> Path:
    """Have NCCL say what it uses; before the world starts. The file of this process."""
    file = Path(tempfile.gettempdir()) / f"dtune-nccl-{os.getpid()}.log"
    os.environ.setdefault("NCCL_DEBUG", "INFO")
    os.environ.setdefault("NCCL_DEBUG_SUBSYS", "INIT,NET")
    os.environ["NCCL_DEBUG_FILE"] = str(file)
    return file


def examine(world: World, settings: ClusterSettings, nccl_log: Path) -> Examined:
    """Run every check, one after the other; the same on every rank. Collective."""
    places = rank_map(world)
    size = settings.size_mib * MIB
    sections, problems = [("Ranks", _map_rows(places))], []
    refused = unreachable(world, places)
    problems += refused
    sections.append(("Ports", [("between nodes", "closed" if refused else "open")]))
    sections.append(("Clocks", _clock_rows(world, places, problems)))
    sections.append((f"Folder {settings.folder}", _folder_rows(world, places, settings, problems)))
    speeds = measure(world, places, size)
    header = ("between", "ranks", "all-reduce", "all-gather  (bus bandwidth)")
    numbers = [
        (s.between, str(s.ranks), f"{s.all_reduce:.2f} GB/s", f"{s.all_gather:.2f} GB/s")
        for s in speeds
    ]
    sections.append(("Speed", [header, *numbers] if numbers else [("one rank", "nothing to do")]))
    problems += slow_pairs(speeds)
    sections.append(("Network", _network_rows(world, places, nccl_log, problems)))
    text = "\n".join(f"{title}\n{columns(rows)}\n" for title, rows in sections)
    told = "\n".join(f"  {line}" for line in problems)
    return Examined(f"{text}\nProblems\n{told or '  none'}\n", problems)


Rows = list[tuple[str, ...]]


def _map_rows(places: list[Place]) -> Rows:
    rows: Rows = [("rank", "node", "local rank", "address", "interface", "device")]
    rows += [
        (str(p.rank), p.node, str(p.local_rank), p.address, p.interface, p.device) for p in places
    ]
    return rows


def _clock_rows(world: World, places: list[Place], problems: list[str]) -> Rows:
    others = [place.rank for place in first_of_nodes(places)[1:]]
    clocks = world.broadcast(clock_offsets(world, others))
    problems += [
        f"the clock of {places[clock.rank].node} is {clock.seconds:+.1f} s from that of "
        f"{places[0].node}: run ntp or chrony on both"
        for clock in clocks
        if abs(clock.seconds) > LARGEST_SKEW
    ]
    rows: Rows = [
        (places[c.rank].node, f"{c.seconds * 1e3:+.1f} ms", f"known to {c.error * 1e3:.1f} ms")
        for c in clocks
    ]
    return rows or [("one node", "nothing to compare")]


def _folder_rows(
    world: World, places: list[Place], settings: ClusterSettings, problems: list[str]
) -> Rows:
    folder = Path(world.broadcast(str(Path(settings.folder).absolute())))
    sights = check_folder(world, places, folder, size=settings.size_mib * MIB, wait=settings.wait)
    problems += [f"{places[s.rank].node} {s.problem}" for s in sights if s.problem]
    return [(places[sight.rank].node, sight.problem or _seen(sight)) for sight in sights]


def _seen(sight: Sight) -> str:
    speed = f"{sight.megabytes_per_second:.0f} MB/s flushed"
    return f"{speed}, all files seen in {sight.seconds_to_see:.2f} s"


def _network_rows(world: World, places: list[Place], nccl_log: Path, problems: list[str]) -> Rows:
    said = nccl_log.read_text(errors="replace") if nccl_log.is_file() else ""
    nccl_log.unlink(missing_ok=True)
    network = network_of_nccl(said) if world.device.type == "cuda" else "gloo"
    found = world.gather(verdict(network, rdma_devices(), [places[world.rank].interface]))
    rows: Rows = []
    for place in first_of_nodes(places):
        over, problem = found[place.rank]
        rows.append((place.node, over))
        if problem:
            problems.append(f"{place.node}: {problem}")
    return rows
