"""Facts about a model, where its values come from, and what it may be asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Role(Enum):
    """What a linear layer is for."""

    attention = "attention"
    mlp = "mlp"
    head = "head"
    other = "other"


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


LOSS_LABELS = "loss_labels"
"""Argument of a model that ``FusesLoss``: int64 [B, S], the target after each position."""
NUM_TARGETS = "num_targets"
"""Argument beside it: how many of them are not IGNORE_INDEX, an int."""
NUM_DOCUMENTS = "num_documents"
"""Argument of every model: ``Batch.num_documents``, known to the host without waiting."""


class FusesLoss:
    """A causal model that, asked with ``LOSS_LABELS``, returns the sum of losses, and no logits."""


def innermost(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside of what an engine wraps around it."""
    while isinstance(inner := model._modules.get("module"), nn.Module):
        model = inner
    return model
