"""Sharded parameters, gradients and optimizer state by torch's ``fully_shard`` (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from dtune.errors import ConfigError
from dtune.parallel.base import TorchEngine
from dtune.parallel.ranges import local_of
from dtune.parallel.schema.fsdp import FsdpConfig
from dtune.parallel.wrap import blocks_of
from dtune.runtime.schema import Precision
from dtune.runtime.world import World
from dtune.types import FlatShard, ModelSpec


class FsdpEngine(TorchEngine):
    """Each block is a unit of gathering, what is left of the model another.

    A rank holds rows of every tensor: ceil(rows / shards) of them, fewer or none at the end.
    """

    def __init__(self, config: FsdpConfig, world: World, precision: Precision) -> None:
        super().__init__(world, precision)
        self._config = config
        self._shards = config.shard_size or world.size
        if world.size % self._shards:
            raise ConfigError(
                f"parallel.shard_size={config.shard_size} does not divide the {world.size} ranks"
            )
        self._mesh = _mesh(world, self._shards)
        self._shard_group = self._mesh.get_group(self._mesh.ndim - 1)
        self.grad_scale = float(world.size)  # gradients are averaged over ranks

    def _spread(self, model: nn.Module, spec: ModelSpec) -> None:
        half = self.precision is not Precision.fp32
        mixed = MixedPrecisionPolicy(
            param_dtype=self.compute_dtype if half else None,
            reduce_dtype=torch.float32 if half else None,
        )
        offload = CPUOffloadPolicy() if self._offloads() else OffloadPolicy()
        for module in (*blocks_of(model, spec), model):
            fully_shard(
                module,
                mesh=self._mesh,
                reshard_after_forward=self._config.reshard_after_forward,
                mp_policy=mixed,
                offload_policy=offload,
            )
        self._allocate(model)

    def _offloads(self) -> bool:
        return self._config.cpu_offload and self.world.device.type != "cpu"

    def _allocate(self, model: nn.Module) -> None:
        device = self.world.device
        parameters = torch.device("cpu") if self._offloads() else device

        def materialise(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_meta:
                return torch.empty_like(tensor, device=parameters)
            return tensor.to(device)

        first = {parameter: name for name, parameter in model.named_parameters()}
        every = model.named_parameters(remove_duplicate=False)
        shared = {name: first[p] for name, p in every if first[p] != name}
        model._apply(materialise)
        for alias, name in shared.items():  # _apply makes two parameters of a shared one
            _set_parameter(model, alias, model.get_parameter(name))

    def _shard(self, name: str, parameter: nn.Parameter) -> FlatShard:
        assert isinstance(parameter, DTensor), name
        rows, *rest = parameter.shape
        row = torch.Size(rest).numel()
        per_rank = -(-rows // self._shards)
        coordinate = self._mesh.get_coordinate()
        assert coordinate is not None
        return FlatShard(
            name,
            tuple(parameter.shape),
            min(coordinate[-1] * per_rank, rows) * row,
            local_of(parameter.detach()).view(-1),
            saved_here=self._mesh.ndim == 1 or coordinate[0] == 0,
        )

    def _sum_over_shards(self, squares: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(squares, group=self._shard_group)
        return squares

    def compute(self) -> AbstractContextManager[None]:
        """Around a forward pass: parameters are in the precision's dtype by themselves."""
        return nullcontext()

    def micro(self, *, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro batch; gradients are reduced on the last."""
        return self._micro(last)

    @contextmanager
    def _micro(self, last: bool) -> Iterator[None]:
        assert isinstance(self.model, FSDPModule)
        self.model.set_requires_gradient_sync(last)
        self.model.set_is_last_backward(last)
        yield


def _mesh(world: World, shards: int) -> DeviceMesh:
    kind = world.device.type
    if shards == world.size:
        return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
    shape = (world.size // shards, shards)
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._parameters[leaf] = parameter
