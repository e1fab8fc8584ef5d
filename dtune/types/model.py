"""Facts about a model, where its values come from, and what it may be asked."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import nn

from dtune.errors import ConfigError

if TYPE_CHECKING:
    from dtune_kernels.weights import QuantizedWeight
    from transformers import PretrainedConfig


class Role(Enum):
    """What a linear layer is for."""

    attention = "attention"
    mlp = "mlp"
    head = "head"
    other = "other"


@dataclass(frozen=True)
class StoredQuant:
    """How a checkpoint keeps the linears that it holds quantised already."""

    settings: Mapping[str, str | int | bool]
    """Keys of the group ``quant`` that keep linears in the very same bytes, ``name`` among them."""
    linears: frozenset[str]
    """Dotted paths of those that are quantised; all others are stored as floats."""


@dataclass(frozen=True)
class ModelSpec:
    """Facts about a built model that components need instead of its class."""

    family: str
    """``model_type`` of the Hugging Face config."""
    path: str
    """Where it was loaded from, as the user wrote it."""
    config: PretrainedConfig
    block_types: tuple[type[nn.Module], ...]
    """Classes of the repeated decoder blocks: units of recomputation, compilation and sharding."""
    linears: Mapping[str, Role]
    """Dotted path of every linear layer, in module order."""
    tied: Mapping[str, str]
    """Parameter name -> the name it shares storage with and is stored under."""

    buffers: tuple[str, ...] = ()
    """Buffers that are stored with the parameters: loaded and exported like them, never trained."""
    num_parameters: int = 0
    stored_dtype: torch.dtype | None = None
    """Dtype of the weights in the base's files; None: that of ``config``."""
    quantized: StoredQuant | None = None
    """How linears are stored, where the checkpoint is quantised already."""
    added_tokens: range = range(0)
    """Ids of the tokens that are new to the model: ``model.added_tokens``."""
    grown: Mapping[str, int] = field(default_factory=dict)
    """Parameter that has more rows than the checkpoint, for new tokens -> rows that are stored."""

    def linears_named(self, name: str) -> list[str]:
        """Paths of the linears with this last component, or that match this glob; may be none."""
        return [
            path
            for path in self.linears
            if path.rpartition(".")[2] == name or fnmatch.fnmatchcase(path, name)
        ]

    def no_linear_error(self, key: str, name: str, roles: Sequence[str]) -> ConfigError:
        """What to raise for a name of the setting ``key`` that is no linear and none of roles."""
        leaves = sorted({path.rpartition(".")[2] for path in self.linears})
        pool = [*roles, *leaves, *(self.linears if "." in name else ())]
        near = difflib.get_close_matches(name, pool, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        return ConfigError(
            f"{key}: {name!r} matches no linear layer of {self.family} ({self.path}); {hint}"
            f"Roles: {', '.join(roles)}. Names: {', '.join(leaves)}"
        )


class TensorSource(Protocol):
    """Where the values of named tensors come from: files, a checkpoint, an initialiser."""

    def __contains__(self, name: str) -> bool:
        """Whether the tensor can be read."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        ...

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the row-major flattened tensor: 1-D, CPU, dtype as stored."""
        ...


Renamer = Callable[[str], str]
"""Name of a parameter in a model -> its name elsewhere."""


@runtime_checkable
class LinearLike(Protocol):
    """y = x W^T + b with any storage of W: a float weight, or bytes."""

    in_features: int
    out_features: int

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        ...


@runtime_checkable
class QuantizedLinearLike(LinearLike, Protocol):
    """A linear whose frozen W is kept as bytes."""

    bias: nn.Parameter | None

    def frozen_weight(self) -> QuantizedWeight:
        """W over the parameters as they are now; for use within the forward that asks for it.

        Reads them through the module, so that an engine that shards them gathers them first.
        """
        ...


LOSS_LABELS = "loss_labels"
"""Argument of a model that ``FusesLoss``: int64 [B, S], the target after each position."""
NUM_TARGETS = "num_targets"
"""Argument beside it: how many of them are not IGNORE_INDEX, an int."""
NUM_DOCUMENTS = "num_documents"
"""Argument of every model: ``Batch.num_documents``, known to the host without waiting."""


class FusesLoss:
    """A causal model that, asked with ``LOSS_LABELS``, returns the sum of losses, and no logits."""


class AddsTokens:
    """A causal model whose forward adds virtual tokens to the rows that it is given.

    Its results are those of the given tokens alone. ``own_forward``, with keywords only, is the
    forward that it had before: what is to see the added tokens as well takes that one's place.
    """


class SharedPrefix:
    """A cache of keys and values that every document sees before its own; it never grows."""

    num_tokens: int
    """How many; the positions of every document begin after them."""


def innermost(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside of what an engine wraps around it."""
    while isinstance(inner := model._modules.get("module"), nn.Module):
        model = inner
    return model
