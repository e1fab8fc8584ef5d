"""What the methods share: linear-like modules, freezing, initial values keyed by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import nn

from dtune.types import LinearLike as LinearLike
from dtune.types import TensorSource

Initializer = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]
"""Makes the whole tensor of a shape, fp32 on CPU."""


class InitialSource:
    """A TensorSource that computes values instead of reading them.

    A value depends on the seed and the parameter's name alone, so it is the same whatever the
    engine, the number of ranks, the order of reading, and the split.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        initializer: Callable[[str], Initializer],
        *,
        seed: int,
    ) -> None:
        self._shapes = dict(shapes)
        self._initializer = initializer
        self._seed = seed

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._shapes[name]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor: fp32, CPU."""
        shape = self._shapes[name]
        generator = torch.Generator("cpu").manual_seed(keyed_seed(self._seed, name))
        return self._initializer(name)(shape, generator).reshape(-1)[start:stop]


class Method:
    """What most methods answer: the base as it is stored, one learning rate."""

    starts_at_base = True
    """Whether the model computes at first what its base does."""

    def stored_name(self, name: str) -> str:
        """The name itself."""
        return name

    def base(self, stored: TensorSource) -> TensorSource:
        """The weights as they are stored."""
        return stored

    def source(self, stored: TensorSource, held: TensorSource, seed: int) -> TensorSource:
        """Nothing: every value comes from the base."""
        return InitialSource({}, _nothing, seed=seed)

    def rate_factor(self, name: str) -> float:
        """One."""
        return 1.0


def _nothing(name: str) -> Initializer:
    raise KeyError(name)


def keyed_seed(seed: int, name: str) -> int:
    """A 63-bit seed of its own for every name."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a LayerNorm or RMSNorm: torch's, or a model family's own by its class."""
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return True
    return any(
        "LayerNorm" in cls.__name__ or "RMSNorm" in cls.__name__ for cls in type(module).mro()
    )


def freeze(model: nn.Module) -> None:
    """Turn off gradients of every parameter."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Elements that are trained, and elements in all; a shared parameter counts once."""
    trainable = total = 0
    for parameter in model.parameters():
        total += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable, total


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in the place of the one at a dotted path."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
