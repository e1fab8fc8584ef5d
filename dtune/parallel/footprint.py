"""What one rank holds of a model under each engine, in bytes: the rules by which engines cut.

Sizes are of the rank that holds most. A buffer that is rounded up is counted with its padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from dtune.parallel.base import COMPUTE_DTYPES
from dtune.parallel.wrap import blocks_of
from dtune.runtime.schema import Precision
from dtune.types import ModelSpec

MASTER = 4
"""Bytes of an element of masters and of their gradients."""

# DeepSpeed's own, which the engine leaves as they are.
ZERO_ALIGNMENT = 2
ZERO3_LIVE = 1_000_000_000

NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Planned:
    """A model on the meta device with its method in place, and how it is to be trained."""

    model: nn.Module
    spec: ModelSpec
    optimizer: Optimizer
    """Over the trained parameters on the meta device: what groups there are."""
    state_bytes: Callable[[int], int]
    """Optimizer state of a tensor of so many elements."""
    precision: Precision
    ranks: int
    accumulates: bool
    """Whether a step has more than one micro batch."""

    @property
    def compute_size(self) -> int:
        """Bytes of an element in the compute dtype."""
        return COMPUTE_DTYPES[self.precision].itemsize

    def trained(self) -> list[nn.Parameter]:
        """Each once, however often it is tied."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def frozen(self) -> list[nn.Parameter]:
        """The same of what is not trained."""
        return [p for p in self.model.parameters() if not p.requires_grad]


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank, besides activations."""

    frozen: int
    masters: int
    """Trained parameters in fp32."""
    copies: int
    """Trained parameters once more, in the compute dtype."""
    gradients: int
    """At most held between the end of a backward pass and the optimizer's step."""
    optimizer: int
    gathered: int = 0
    """Whole parameters of other ranks, at most at once."""
    buckets: int = 0
    """Buffers that gradients are reduced in, at most."""
    autocasts: bool = False
    """Whether masters are computed with, under autocast, and not cast parameters."""
    gradients_stay: bool = False
    """Whether gradients lie in buffers that are there all the time."""
    host: frozenset[str] = NOTHING
    """Those of the first five that are in host memory, by their names."""

    @property
    def on_host(self) -> bool:
        """Whether anything is in host memory."""
        return bool(self.host)

    @property
    def host_bytes(self) -> int:
        """In host memory."""
        return sum(vars(self)[name] for name in self.host)

    @property
    def device_bytes(self) -> int:
        """On the device, with what is there for a while."""
        own = self.frozen + self.masters + self.copies + self.gradients + self.optimizer
        return own - self.host_bytes + self.gathered + self.buckets


def _on_host(stays: set[str]) -> frozenset[str]:
    """What an engine that offloads has in host memory, but what stays on the device."""
    return frozenset({"frozen", "masters", "copies", "gradients", "optimizer"} - stays)


def of_replica(planned: Planned, *, in_buckets: bool = False) -> Footprint:
    """Everything on every rank; with ddp gradients lie in its buckets."""
    trained = [p.numel() for p in planned.trained()]
    return Footprint(
        frozen=_stored(planned.frozen()),
        masters=MASTER * sum(trained),
        copies=0,
        gradients=MASTER * sum(trained),
        optimizer=sum(map(planned.state_bytes, trained)),
        autocasts=True,
        gradients_stay=in_buckets,
    )


def of_fsdp(planned: Planned, *, shards: int, on_host: bool) -> Footprint:
    """Rows of every tensor, as many on each rank, the last ones padded.

    A micro batch that does not end the step leaves its gradients whole, and on the device. Gathered
    are what is outside of blocks, one block, and the next, which is fetched meanwhile.
    """

    def held(parameter: nn.Parameter) -> int:
        rows, *rest = parameter.shape
        return -(-rows // shards) * math.prod(rest)

    trained = planned.trained()
    masters = MASTER * sum(map(held, trained))
    whole = MASTER * sum(p.numel() for p in trained)
    return Footprint(
        frozen=sum(held(p) * p.itemsize for p in planned.frozen()),
        masters=masters,
        copies=0,
        gradients=max(masters, whole if planned.accumulates else 0),
        optimizer=sum(planned.state_bytes(held(p)) for p in trained),
        gathered=_gathered(planned),
        buckets=_reduced(planned),
        host=_on_host({"gradients"} if planned.accumulates else set()) if on_host else NOTHING,
    )


def _reduced(planned: Planned) -> int:
    """Gradients of a block, whole, and their copy that is reduced in fp32."""
    blocks = blocks_of(planned.model, planned.spec)
    inside = {id(p) for block in blocks for p in block.parameters()}
    groups = [list(block.parameters()) for block in blocks]
    groups.append([p for p in planned.model.parameters() if id(p) not in inside])
    trained = [sum(p.numel() for p in group if p.requires_grad) for group in groups]
    return (planned.compute_size + MASTER) * max(trained)


def _gathered(planned: Planned) -> int:
    blocks = blocks_of(planned.model, planned.spec)
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = [p for p in planned.model.parameters() if id(p) not in inside]
    largest = max((_computed(planned, block.parameters()) for block in blocks), default=0)
    return _computed(planned, outside) + 2 * largest


def _computed(planned: Planned, parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of whole parameters as the forward pass reads them."""
    return sum(
        p.numel() * (planned.compute_size if p.dtype.is_floating_point else p.itemsize)
        for p in parameters
    )


def _stored(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.itemsize for p in parameters)


def of_zero(planned: Planned, *, stage: int, bucket: int, on_host: bool) -> Footprint:
    """ZeRO by DeepSpeed, stages 1 to 3."""
    if stage == 3:
        return _of_zero3(planned, bucket=bucket, on_host=on_host)
    size, ranks = planned.compute_size, planned.ranks
    groups = [[p.numel() for p in group["params"]] for group in planned.optimizer.param_groups]
    alignment = ZERO_ALIGNMENT * ranks
    flat = [-(-sum(group) // alignment) * alignment for group in groups]
    shares = [numel // ranks for numel in flat]
    whole = sum(map(sum, groups))
    # Stage 1 adds up in the compute dtype, but fp16, which it adds up in fp32.
    staged = MASTER if stage == 1 and planned.precision is Precision.fp16 else size
    return Footprint(
        frozen=_stored(planned.frozen()),
        masters=MASTER * sum(shares),
        copies=size * sum(flat),
        gradients=staged * whole if stage == 1 else _zero2_gradients(planned, groups, shares),
        optimizer=sum(map(planned.state_bytes, shares)),
        buckets=staged * min(bucket, whole),
        # What is computed with stays, and so does what stage 1 adds up.
        host=_on_host({"frozen", "copies", *(["gradients"] if stage == 1 else [])})
        if on_host
        else NOTHING,
    )


def _zero2_gradients(planned: Planned, groups: list[list[int]], shares: list[int]) -> int:
    """A share in fp32. In fp32 DeepSpeed keeps whole the tensors that a share cuts through."""
    if planned.precision is not Precision.fp32:
        return MASTER * sum(shares)
    return MASTER * max(
        sum(
            _overlapping(group, rank * share, (rank + 1) * share)
            for group, share in zip(groups, shares, strict=True)
        )
        for rank in range(planned.ranks)
    )


def _overlapping(numels: list[int], start: int, stop: int) -> int:
    """Elements of those of consecutive tensors that reach into the range."""
    total = at = 0
    for numel in numels:
        total += numel if at < stop and at + numel > start else 0
        at += numel
    return total


def _of_zero3(planned: Planned, *, bucket: int, on_host: bool) -> Footprint:
    def held(parameter: nn.Parameter) -> int:
        return -(-parameter.numel() // planned.ranks)

    trained = planned.trained()
    share = sum(map(held, trained))
    groups = [sum(map(held, group["params"])) for group in planned.optimizer.param_groups]
    return Footprint(
        frozen=sum(held(p) * p.itemsize for p in planned.frozen()),
        masters=MASTER * share,
        copies=planned.compute_size * share,
        gradients=MASTER * share,
        optimizer=sum(map(planned.state_bytes, groups)),
        gathered=min(
            _computed(planned, planned.model.parameters()), ZERO3_LIVE * planned.compute_size
        ),
        buckets=MASTER * min(bucket, sum(p.numel() for p in trained)),
        host=_on_host(set()) if on_host else NOTHING,
    )
