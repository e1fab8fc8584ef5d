"""What a rank sends in one optimizer step under each engine, in bytes: by collective.

A ring is taken for granted: of n ranks each sends n - 1 of the n shares of what is gathered or
scattered, and twice that of what is reduced everywhere. Counts of a few bytes (losses, norms) are
left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from dtune.parallel.footprint import MASTER, ZERO3_LIVE, ZERO_ALIGNMENT, Planned


@dataclass(frozen=True)
class Collective:
    """One kind of collective, all of a step together."""

    name: str
    """all-gather, reduce-scatter or all-reduce."""
    what: str
    sent: int
    """Bytes from one rank."""
    ranks: int
    """That take part in one of them."""
    apart: int = 1
    """Distance of neighbours in a group: 1: consecutive ranks."""
    overlaps: bool = True
    """Whether the passes go on meanwhile."""


def ring(count: int, size: int, ranks: int) -> int:
    """Bytes sent for a gathered or scattered tensor of so many elements, padded to equal shares."""
    return (ranks - 1) * -(-count // ranks) * size


def of_ddp(planned: Planned, *, one_bucket: int) -> list[Collective]:
    """Gradients are reduced once a step: at the end where they are one bucket, else meanwhile.

    ``one_bucket``: most bytes of them that are.
    """
    trained, ranks = sum(p.numel() for p in planned.trained()), planned.ranks
    alone = bool(planned.frozen()) and MASTER * trained <= one_bucket
    sent = 2 * (ranks - 1) * MASTER * trained // ranks
    return _present([Collective("all-reduce", "gradients", sent, ranks, overlaps=not alone)])


def of_fsdp(planned: Planned, *, shards: int, reshards: bool, micros: int) -> list[Collective]:
    """Rows of every tensor are gathered for forward, and for backward where they are freed."""

    def shard(parameter: nn.Parameter) -> int:
        rows, *rest = parameter.shape
        return -(-rows // shards) * math.prod(rest)

    def read(parameters: Iterable[nn.Parameter]) -> int:
        return sum(
            shard(p) * (planned.compute_size if p.dtype.is_floating_point else p.itemsize)
            for p in parameters
        )

    forward = micros * (shards - 1) * read(planned.model.parameters())
    backward = forward if reshards else 0
    mine = MASTER * sum(map(shard, planned.trained()))
    replicas = planned.ranks // shards
    return _present(
        [
            Collective("all-gather", "weights for forward", forward, shards),
            Collective("all-gather", "weights for backward", backward, shards),
            Collective("reduce-scatter", "gradients", (shards - 1) * mine, shards),
            Collective(
                *("all-reduce", "gradients over replicas", 2 * (replicas - 1) * mine // replicas),
                *(replicas, shards),
            ),
        ]
    )


def of_zero(planned: Planned, *, stage: int, persistent: int, micros: int) -> list[Collective]:
    """ZeRO by DeepSpeed, stages 1 to 3. ``persistent``: elements below which a tensor stays."""
    if stage == 3:
        return _of_zero3(planned, persistent=persistent, micros=micros)
    ranks = planned.ranks
    trained = sum(p.numel() for p in planned.trained())
    groups = [sum(p.numel() for p in g["params"]) for g in planned.optimizer.param_groups]
    alignment = ZERO_ALIGNMENT * ranks
    flat = sum(-(-numel // alignment) * alignment for numel in groups)
    # Stage 1 reduces what it has added up; stage 2 each micro batch, and keeps its share.
    times = micros if stage == 2 else 1
    reduced = 2 * (ranks - 1) * MASTER * trained * times // ranks
    return _present(
        [
            Collective("all-reduce", "gradients", reduced, ranks),
            Collective(
                *("all-gather", "trained weights", ring(flat, planned.compute_size, ranks), ranks),
                overlaps=False,
            ),
        ]
    )


def _of_zero3(planned: Planned, *, persistent: int, micros: int) -> list[Collective]:
    ranks, size = planned.ranks, planned.compute_size

    def sent(parameters: Iterable[nn.Parameter]) -> int:
        return sum(
            ring(p.numel(), size if p.dtype.is_floating_point else p.itemsize, ranks)
            for p in parameters
        )

    once, again, later = 0, 0, 0
    parameters = list(planned.model.parameters())
    for parameter in reversed(parameters):
        later += parameter.numel()
        if parameter.numel() > persistent:
            gathered = sent([parameter])
            once += gathered
            # DeepSpeed fetches ahead until so many elements are there, past the end of forward:
            # what is then still there is kept for backward.
            again += gathered if later > ZERO3_LIVE else 0
    trained = planned.trained()
    return _present(
        [
            Collective("all-gather", "weights for forward", micros * once, ranks),
            Collective("all-gather", "weights for backward", micros * again, ranks),
            Collective(
                *("reduce-scatter", "gradients"),
                micros * sum(ring(p.numel(), MASTER, ranks) for p in trained),
                ranks,
            ),
            Collective(
                *("all-gather", "small weights"),
                sent(p for p in parameters if p.numel() <= persistent),
                ranks,
                overlaps=False,
            ),
        ]
    )


def _present(collectives: list[Collective]) -> list[Collective]:
    return [one for one in collectives if one.sent]
