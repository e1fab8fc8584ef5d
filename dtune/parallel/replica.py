"""Engines that hold the whole model on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from dtune.parallel.base import TorchEngine
from dtune.parallel.ranges import copy_whole
from dtune.types import FlatShard, ModelSpec


def _nothing_more(old: nn.Parameter, new: nn.Parameter) -> None:
    """What happens to a new parameter by default."""


def allocate(
    model: nn.Module,
    device: torch.device,
    *,
    made: Callable[[nn.Parameter, nn.Parameter], None] = _nothing_more,
) -> None:
    """Replace meta parameters by empty ones on the device and move buffers there, in place.

    A parameter that several modules share stays shared. ``made`` is called with each old and new
    parameter before the next is allocated.
    """
    made_by_id: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made_by_id:
                made_by_id[id(parameter)] = nn.Parameter(
                    torch.empty_like(parameter, device=device),
                    requires_grad=parameter.requires_grad,
                )
                made(parameter, made_by_id[id(parameter)])
            module._parameters[leaf] = made_by_id[id(parameter)]
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = buffer.to(device)


class ReplicaEngine(TorchEngine):
    """The whole of every tensor on this rank; the first rank saves."""

    def _spread(self, model: nn.Module, spec: ModelSpec) -> None:
        allocate(model, self.world.device)

    def _holds_whole(self) -> bool:
        return True

    def _shard(self, name: str, parameter: nn.Parameter) -> FlatShard:
        return FlatShard(
            name,
            tuple(parameter.shape),
            0,
            parameter.detach().view(-1),
            saved_here=self.world.is_first,
        )

    @torch.no_grad()
    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Each trainable parameter whole, fp32 on CPU; None but on the first rank, which has it."""
        for name, parameter in self._trained.items():
            first = self.world.is_first
            yield name, copy_whole(self._shard(name, parameter)) if first else None
