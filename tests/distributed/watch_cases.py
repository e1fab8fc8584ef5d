"""What ranks of the tests do to wait for each other, and to tell different times."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from dtune.errors import HungError
from dtune.runtime.clocks import warn_of_clocks
from dtune.runtime.logs import log
from dtune.runtime.watch import heartbeat, join
from dtune.runtime.watch.schema import WatchConfig
from dtune.runtime.world import World
from dtune.worker import lost_a_peer


def timeouts(config: WatchConfig, world: World) -> tuple[set[timedelta], timedelta]:
    """Of all groups but the one of votes, one that an engine would have made among them; of it."""
    dist.new_group(backend="gloo")
    world.allow(join.collective_timeout(config))
    held = {group: timeout_of(group) for group in list(_world.pg_names)}
    votes = held.pop(world.host)
    return set(held.values()), votes


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    given: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return given


def timeouts_of_ranks(
    world: World, *, settings: dict[str, float]
) -> tuple[set[timedelta], timedelta]:
    """In a rank, for a watch of these settings."""
    return timeouts(WatchConfig(**settings), world)  # type: ignore[arg-type]


@contextmanager
def _said() -> Iterator[list[str]]:
    """What is logged in the block."""
    lines: list[str] = []
    with mock.patch.object(log, "warning", lambda text, *values: lines.append(text % values)):
        assert log.level <= logging.WARNING
        yield lines


def clocks(world: World, *, seconds: float, one_host: bool) -> list[str]:
    """The clock of rank 1 is ahead; what each rank says of it."""
    ahead = seconds if world.rank == 1 else 0.0
    name = "n1" if one_host else f"n{world.rank + 1}"
    now = time.time

    def shifted() -> float:
        return now() + ahead

    with (
        mock.patch.object(time, "time", shifted),
        mock.patch.object(socket, "gethostname", return_value=name),
        _said() as lines,
    ):
        warn_of_clocks(world)
    return lines


def nobody_comes(world: World, *, wording: str) -> tuple[int, str, bool]:
    """All but rank 1 meet; what they raise: its rank, its text, and whether it is an echo.

    ``wording`` is what torch says then, where it is not what it says today.
    """
    # A group of its own: what is left of a barrier that failed is of no use.
    mine = replace(world, host=dist.new_group(backend="gloo"))
    real = dist.monitored_barrier

    def reworded(**kwargs: object) -> None:
        try:
            real(**kwargs)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise RuntimeError(wording or str(error)) from error

    found = (0, "", False)
    if world.rank != 1:
        with mock.patch.object(dist, "monitored_barrier", reworded):
            try:
                mine.meet(1.0)
            except HungError as error:
                found = (error.rank, str(error), False)
            except RuntimeError as error:
                found = (-2, str(error), lost_a_peer(error))
    world.barrier()
    return found


def meeting_seconds(world: World, *, gap: float, settings: dict[str, float]) -> list[float]:
    """How long ranks wait for each other after a step that was silent for ``gap`` seconds."""
    given: list[float] = []
    with (
        mock.patch.object(World, "meet", lambda self, seconds: given.append(seconds)),
        mock.patch.object(join, "longest_gap", return_value=gap),
    ):
        join.meet_ranks(world, WatchConfig(**settings))  # type: ignore[arg-type]
    assert heartbeat.longest_gap() == 0.0  # Nobody watches here.
    return given
