"""What autograd saves for backward, as hooks see it: parameters by name, the rest as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks


@dataclass(slots=True)
class _OfParameter:
    """A view of a parameter; made anew in backward, of what the parameter then holds."""

    base: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    """From the parameter's own first element."""

    def restore(self) -> torch.Tensor:
        base = self.base.detach()
        return base.as_strided(self.size, self.stride, base.storage_offset() + self.offset)


@dataclass(slots=True)
class _Kept:
    """A tensor that stays where it is. Hooks take away autograd's own check for changes."""

    tensor: torch.Tensor
    version: int

    def restore(self) -> torch.Tensor:
        check_unchanged(self.tensor, self.version)
        return self.tensor


def check_unchanged(tensor: torch.Tensor, version: int) -> None:
    """Raise RuntimeError for a saved tensor that has been written to since."""
    if tensor._version != version:
        raise RuntimeError(
            "a tensor was modified in place after it had been saved for backward: "
            f"{tuple(tensor.shape)}, {tensor.dtype}"
        )


def parameter_of(tensor: torch.Tensor) -> nn.Parameter | None:
    """The parameter that a saved tensor is, or is a view of."""
    base = tensor if tensor._base is None else tensor._base
    return base if isinstance(base, nn.Parameter) else None


def keep(tensor: torch.Tensor) -> Any:
    """Pack a tensor without holding the storage of a parameter.

    ZeRO-3 gives a parameter another storage each time that it gathers it. A saved view, such as
    the transposed weight of a linear, would hold the old one until backward: the whole model.
    """
    base = parameter_of(tensor)
    if base is None or base.dtype != tensor.dtype:
        # Detached: the output of a node, held by the node itself, would never be freed.
        return _Kept(tensor.detach(), tensor._version)
    if tensor is base:
        return base
    offset = int(tensor.storage_offset() - base.storage_offset())
    return _OfParameter(base, tensor.size(), tensor.stride(), offset)


def restore(saved: Any) -> torch.Tensor:
    """Unpack what ``keep`` packed."""
    tensor: torch.Tensor = saved.restore() if isinstance(saved, _OfParameter | _Kept) else saved
    return tensor


def parameters_by_name() -> saved_tensors_hooks:
    """Around a forward pass: what is saved of a parameter holds no storage of it."""
    return saved_tensors_hooks(keep, restore)
