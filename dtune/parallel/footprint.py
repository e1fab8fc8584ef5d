"""What one rank holds of a model under each engine, in bytes: the rules by which engines cut.

Sizes are of the rank that holds most. A buffer that is rounded up is counted with its padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

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
    alignment: Callable[[int], int]
    """Of one buffer that whole parameters of so many bytes are put into; 0: there is none."""
    stepping: Callable[[int, bool], int]
    """Bytes that updating so many elements takes besides, which decay or do not."""
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
    reduces_late: bool = False
    """Whether gradients are reduced, and buffers there, only as backward leaves blocks."""
    afterwards: int = 0
    """Besides gradients, at most when activations are gone: reduced last, or for the step."""
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


def of_replica(planned: Planned, *, one_bucket: int | None = None) -> Footprint:
    """Everything on every rank.

    With ddp gradients lie in its buckets: one for all, beside a frozen base, where they take at
    most ``one_bucket`` bytes. Several fill in the last micro batch, and what was added up before
    is beside them until then. An optimizer over one buffer takes the place of the one bucket: it
    puts gradients together at the end of a step, when they are there twice.
    """
    trained = [p.numel() for p in planned.trained()]
    size = MASTER * sum(trained)
    is_whole = one_bucket is None or (bool(planned.frozen()) and size <= one_bucket)
    alignment = planned.alignment(size) if is_whole else 0
    held = [-(-numel // alignment) * alignment for numel in trained] if alignment else trained
    masters = MASTER * sum(held)
    return Footprint(
        frozen=_stored(planned.frozen()),
        masters=masters,
        copies=0,
        gradients=size if one_bucket is None else masters,
        optimizer=sum(map(planned.state_bytes, held)),
        buckets=size if planned.accumulates and not is_whole else 0,
        autocasts=True,
        gradients_stay=one_bucket is not None and not alignment,
        afterwards=masters if alignment else _stepping(planned, nn.Parameter.numel),
    )


def _stepping(planned: Planned, held: Callable[[nn.Parameter], int]) -> int:
    """What the update of the largest group takes besides, of so many elements of each parameter."""
    return max(
        planned.stepping(sum(map(held, group["params"])), group["weight_decay"] > 0)
        for group in planned.optimizer.param_groups
    )


def of_fsdp(planned: Planned, *, shards: int, reshards: bool, on_host: bool) -> Footprint:
    """Rows of every tensor, as many on each rank, the last ones padded.

    A micro batch that does not end the step leaves its gradients whole, and on the device. Gathered
    are what is outside of blocks, one block, and the next, which is fetched meanwhile; everything,
    where a block is not freed after its forward. A block's gradients are reduced as backward leaves
    it, those of what is outside of blocks at the end, when activations are gone.
    """

    def held(parameter: nn.Parameter) -> int:
        rows, *rest = parameter.shape
        return -(-rows // shards) * math.prod(rest)

    trained = planned.trained()
    masters = MASTER * sum(map(held, trained))
    whole = MASTER * sum(p.numel() for p in trained)
    blocks, outside = _groups(planned)
    reducing = planned.compute_size + MASTER
    return Footprint(
        frozen=sum(held(p) * p.itemsize for p in planned.frozen()),
        masters=masters,
        copies=0,
        gradients=max(masters, whole if planned.accumulates else 0),
        optimizer=sum(planned.state_bytes(held(p)) for p in trained),
        gathered=_gathered(planned) if reshards else _computed(planned, planned.model.parameters()),
        buckets=reducing * max(map(_trained, blocks), default=0)
        + planned.compute_size * _trained(_without_embeddings(planned, outside)),
        reduces_late=True,
        # Before a group is reduced its weights are freed.
        afterwards=max(reducing * _trained(outside), 0 if on_host else _stepping(planned, held)),
        host=_on_host({"gradients"} if planned.accumulates else set()) if on_host else NOTHING,
    )


def _groups(planned: Planned) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
    """Parameters of each block, and those outside of blocks."""
    blocks = [list(block.parameters()) for block in blocks_of(planned.model, planned.spec)]
    inside = {id(p) for block in blocks for p in block}
    return blocks, [p for p in planned.model.parameters() if id(p) not in inside]


def _trained(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters if p.requires_grad)


def _without_embeddings(planned: Planned, outside: list[nn.Parameter]) -> list[nn.Parameter]:
    """Whose gradients are there from the start of backward on; those of embeddings come last."""
    assert isinstance(planned.model, PreTrainedModel)
    last = {id(p) for p in planned.model.get_input_embeddings().parameters()}
    return [p for p in outside if id(p) not in last]


def _gathered(planned: Planned) -> int:
    blocks, outside = _groups(planned)
    largest = max((_computed(planned, block) for block in blocks), default=0)
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
