"""Replicas with averaged gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dtune.parallel.replica import ReplicaEngine
from dtune.parallel.schema.ddp import DdpConfig
from dtune.runtime.schema import Precision
from dtune.runtime.world import World


class DdpEngine(ReplicaEngine):
    """torch's DistributedDataParallel; frozen parameters are neither reduced nor broadcast."""

    def __init__(self, config: DdpConfig, world: World, precision: Precision) -> None:
        super().__init__(world, precision)
        self._config = config
        self.grad_scale = float(world.size)  # gradients are averaged over ranks

    def _wrap(self, model: nn.Module) -> nn.Module:
        device = self.world.device
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            # Every rank has read the same values.
            init_sync=False,
            bucket_cap_mb=self._config.bucket_mib,
            gradient_as_bucket_view=True,
            # By default DDP fills its buckets anew after the first backward. From three ranks on,
            # the order of additions depends on a gradient's place in its bucket, so that the
            # first step of a resumed run would differ in the last bits.
            find_unused_parameters=self.world.size > 2,
        )

    def micro(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro batch; gradients are reduced on the last."""
        assert isinstance(self.model, DistributedDataParallel)
        return self._micro(nullcontext() if last else self.model.no_sync())

    @contextmanager
    def _micro(self, sync: AbstractContextManager[None]) -> Iterator[None]:
        with sync, self.compute():
            yield
