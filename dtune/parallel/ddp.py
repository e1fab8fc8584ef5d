"""Replicas with averaged gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dtune.parallel.replica import ReplicaEngine
from dtune.parallel.schema.ddp import DdpConfig
from dtune.runtime.schema import Precision
from dtune.runtime.world import World

MIB = 1 << 20


class OneBucket:
    """All gradients in one buffer, reduced at once when the last backward pass is through.

    For few trained parameters beside a frozen base: waiting for many small reductions costs more
    than beginning the first of them early gains. Also, a gradient keeps its place in the buffer,
    on which the order of additions depends from three ranks on: DDP finds its places in the first
    backward pass, so that the first step of a resumed run would differ in the last bits.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._flat: torch.Tensor | None = None

    def attach(self) -> None:
        """Have backward passes add to the buffer, which is zero at the start of a step."""
        if all(p.grad is not None for p in self._parameters):
            return
        sizes = [p.numel() for p in self._parameters]
        if self._flat is None:
            first = self._parameters[0]
            self._flat = torch.empty(sum(sizes), dtype=first.dtype, device=first.device)
        self._flat.zero_()
        pieces = self._flat.split(sizes)
        for parameter, piece in zip(self._parameters, pieces, strict=True):
            parameter.grad = piece.view(parameter.shape)

    def average(self, ranks: int) -> None:
        """Replace the gradients by their mean over ranks. Collective."""
        assert self._flat is not None, "attach comes first"
        average(self._flat, ranks)


def average(gradients: torch.Tensor, ranks: int) -> None:
    """Replace one buffer of gradients by its mean over ranks. Collective."""
    gradients.div_(ranks)
    dist.all_reduce(gradients)


class DdpEngine(ReplicaEngine):
    """Gradients are averaged; frozen parameters are neither reduced nor broadcast.

    In one bucket where a small part of the model is trained, else by torch's
    DistributedDataParallel, in buckets that are reduced while the backward pass goes on.
    """

    def __init__(self, config: DdpConfig, world: World, precision: Precision) -> None:
        super().__init__(world, precision)
        self._config = config
        self.grad_scale = float(world.size)  # gradients are averaged over ranks
        self._bucket: OneBucket | None = None
        self._is_last = True

    def _wrap(self, model: nn.Module) -> nn.Module:
        trained = [p for p in model.parameters() if p.requires_grad]
        has_frozen = len(trained) < sum(1 for _ in model.parameters())
        size = sum(p.numel() * p.itemsize for p in trained)
        if has_frozen and 0 < size <= self._config.one_bucket_mib * MIB:
            self._bucket = OneBucket(trained)
            return model
        device = self.world.device
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            # Every rank has read the same values.
            init_sync=False,
            bucket_cap_mb=self._config.bucket_mib,
            gradient_as_bucket_view=True,
            # By default DDP fills its buckets anew after the first backward: see ``OneBucket``.
            find_unused_parameters=self.world.size > 2,
        )

    def _holds_whole(self) -> bool:
        return self._bucket is not None

    def micro(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro batch; gradients are reduced on the last."""
        self._is_last = last
        if self._bucket is not None:
            if self._gatherer is None:
                self._bucket.attach()
            return self.compute()
        assert isinstance(self.model, DistributedDataParallel)
        return self._micro(nullcontext() if last else self.model.no_sync())

    @contextmanager
    def _micro(self, sync: AbstractContextManager[None]) -> Iterator[None]:
        with sync, self.compute():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss."""
        super().backward(loss)
        if self._bucket is None or not self._is_last:
            return
        if self._gatherer is not None:
            average(self._gatherer.gather(), self.world.size)
        else:
            self._bucket.average(self.world.size)
