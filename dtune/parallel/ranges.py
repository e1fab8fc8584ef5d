"""Flat ranges of tensors: filling them, naming optimizer state, and putting them together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Optimizer

from dtune.runtime.world import World
from dtune.types import FlatShard, TensorSource

# Elements read at once: bounds the staging copy of a load to 64 MiB of fp32.
CHUNK = 1 << 24


@torch.no_grad()
def fill(shards: Iterable[FlatShard], source: TensorSource) -> None:
    """Read the values of every range from the source, in pieces, into the engine's storage."""
    for shard in shards:
        stored = source.shape(shard.name)
        assert stored == shard.shape, f"{shard.name}: {stored} stored, {shard.shape} wanted"
        for offset in range(0, shard.local.numel(), CHUNK):
            target = shard.local[offset : offset + CHUNK]
            start = shard.start + offset
            target.copy_(source.read(shard.name, start, start + target.numel()))


@torch.no_grad()
def fill_buffers(model: nn.Module, source: TensorSource) -> None:
    """Read the buffers that the source has."""
    for name, buffer in model.named_buffers():
        if name in source:
            values = source.read(name, 0, buffer.numel())
            buffer.copy_(values.view(buffer.shape))


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, sharing its storage."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def state_shards(shard: FlatShard, state: Mapping[str, Any]) -> Iterator[FlatShard]:
    """Ranges of the optimizer's tensors for one parameter whose own range is ``shard``.

    State of the parameter's size follows its range; other state is whole on every rank.
    """
    for key, value in sorted(state.items()):
        if key == "step" or not isinstance(value, torch.Tensor):
            continue
        name = f"{key}/{shard.name}"
        local = local_of(value)
        if local.numel() == shard.local.numel():
            yield replace(shard, name=name, local=local.view(-1))
        else:
            yield FlatShard(name, tuple(value.shape), 0, local.view(-1), shard.saved_here)


def get_step(optimizer: Optimizer) -> int:
    """Steps that the optimizer has counted; 0 for one that does not count."""
    counts = {int(state["step"]) for state in optimizer.state.values() if state and "step" in state}
    assert len(counts) <= 1, counts
    return counts.pop() if counts else 0


def set_step(optimizer: Optimizer, step: int) -> None:
    """Set the step count of every parameter that has one."""
    for state in optimizer.state.values():
        if "step" not in state:
            continue
        if isinstance(state["step"], torch.Tensor):
            state["step"].fill_(step)
        else:
            state["step"] = step


def create_optimizer_state(optimizer: Optimizer) -> None:
    """Make the optimizer allocate its state before the first step, changing no parameter.

    State is created by the first step, so one is taken with zero gradients at learning rate 0;
    not for SGD without momentum, which has no state ever.
    """
    if optimizer.state or _is_stateless(optimizer):
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    set_step(optimizer, 0)


def _is_stateless(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, SGD) and not any(g["momentum"] for g in optimizer.param_groups)


def copy_whole(shard: FlatShard) -> torch.Tensor:
    """A range that is the whole tensor: fp32 on CPU, sharing no storage."""
    return shard.local.detach().to("cpu", torch.float32, copy=True).view(shard.shape)


def gather(shard: FlatShard, world: World) -> torch.Tensor | None:
    """The whole tensor that ranks hold ranges of: fp32 on CPU on the first rank, None elsewhere.

    Collective. Ranks whose range is saved elsewhere contribute nothing.
    """
    if world.size == 1:
        return copy_whole(shard)
    whole = torch.zeros(
        torch.Size(shard.shape).numel(), dtype=torch.float32, device=shard.local.device
    )
    if shard.saved_here:
        whole[shard.start : shard.stop].copy_(shard.local.detach())
    dist.reduce(whole, dst=0)
    return whole.cpu().view(shard.shape) if world.is_first else None
