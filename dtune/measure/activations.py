"""What one forward pass leaves in memory for backward, counted on tensors without values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dtune.measure.storages import StorageTally
from dtune.types import Batch


@dataclass(frozen=True)
class Saved:
    """Bytes that are alive between forward and backward, besides parameters and the batch."""

    activations: int
    copies: int
    """Copies of weights in another dtype, which autocast keeps until the end of the step."""


def count_saved(
    model: nn.Module,
    batch: Batch,
    loss: Callable[[nn.Module, Batch], torch.Tensor],
    *,
    trained_dtype: torch.dtype,
    autocast: torch.dtype | None,
    device: torch.device,
) -> Saved:
    """Run the forward pass of one micro batch as ``device`` would, without memory or values.

    Every storage that an operation made and that is alive when the loss is there counts once:
    what autograd saved, what recomputation keeps, what autocast caches.

    Args:
        model: On the meta device with its buffers on the CPU; it is turned into tensors without
            values and is of no other use afterwards.
        batch: On the CPU. Its values are not read.
        loss: Forward and loss.
        trained_dtype: What trained parameters are computed with or cast from.
        autocast: Dtype of autocast around the forward pass; None: there is none.
        device: Decides which of torch's implementations run.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _empty(model, mode, trained_dtype, device)
    inputs = _batch_in(batch, mode, device)
    model.train()
    tally = StorageTally(copied_from=model.parameters())
    context = nullcontext() if autocast is None else torch.autocast(device.type, dtype=autocast)
    besides = [*model.parameters(), *model.buffers(), *_tensors(inputs)]
    with mode, tally, context:
        result = loss(model, inputs)
        total, copies = tally.alive(besides=besides), tally.alive_copies()
        del result
    return Saved(total - copies, copies)


def _empty(
    model: nn.Module, mode: FakeTensorMode, trained_dtype: torch.dtype, device: torch.device
) -> None:
    """Replace parameters and buffers by ones without values, in place; shared ones stay so."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                dtype = trained_dtype if parameter.requires_grad else parameter.dtype
                with mode:
                    empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[leaf] = made[id(parameter)]
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                with mode:
                    empty = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
                module._buffers[leaf] = empty


def _batch_in(batch: Batch, mode: FakeTensorMode, device: torch.device) -> Batch:
    with mode:
        fake: dict[str, Any] = {
            field.name: torch.empty(value.shape, dtype=value.dtype, device=device)
            for field in dataclasses.fields(batch)
            if isinstance(value := vars(batch)[field.name], torch.Tensor)
        }
    return dataclasses.replace(batch, **fake)


def _tensors(batch: Batch) -> list[torch.Tensor]:
    return [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
