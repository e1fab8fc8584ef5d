"""What changes a built model: methods and quantisers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from dtune.types.model import ModelSpec, Renamer, TensorSource


@dataclass(frozen=True)
class InjectReport:
    """What a method did to the model."""

    method: str
    replaced: Mapping[str, int]
    """Type of module replaced or added -> how often."""
    trainable: int
    total: int


class PeftMethod(Protocol):
    """Module surgery on a built model: adapters in, everything else frozen."""

    export_name: str
    """Folder of what ``save`` writes in a run: ``adapter``, or ``model`` for the whole of it."""
    starts_at_base: bool
    """Whether the model computes at first what its base does."""

    def inject(self, model: nn.Module, spec: ModelSpec) -> InjectReport:
        """On the meta device, in place. ConfigError if a target matches nothing.

        What is left without a gradient is frozen: ``quant`` may then keep its linears as bytes.
        """
        ...

    def stored_name(self, name: str) -> str:
        """Name in the base checkpoint of a parameter of the injected model."""
        ...

    def base(self, stored: TensorSource) -> TensorSource:
        """The base's weights as the model is to hold them, by the names of the injected model.

        ``stored`` are the weights of the checkpoint by those names. Most methods change nothing.
        """
        ...

    def source(self, stored: TensorSource, held: TensorSource, seed: int) -> TensorSource:
        """Initial values of the parameters that ``inject`` added, keyed by name and seed.

        Args:
            stored: The weights of the checkpoint, by the names of the injected model.
            held: The same as the model computes with them: after ``base`` and quantisation.
            seed: Of the run.
        """
        ...

    def rate_factor(self, name: str) -> float:
        """Factor on the learning rate of a trained parameter; 1 unless the method says so."""
        ...

    def exported_bytes(self) -> int:
        """Size of the weights that ``save`` will write; after ``inject``."""
        ...

    def save(self, tensors: Iterator[tuple[str, torch.Tensor | None]], folder: str) -> None:
        """Write the adapter in PEFT's layout, or the model in Hugging Face's, on the first rank.

        ``tensors`` are those that are trained, and for ``export_name`` model every stored one.
        The folder appears whole or not at all. CheckpointError, on the first rank, if it cannot.
        """
        ...

    def saved(self, folder: str) -> TensorSource:
        """Values that ``save`` wrote, under the parameters' names; after ``inject``.

        ConfigError where the folder holds another method, other settings or other layers.
        """
        ...


@runtime_checkable
class TakesPartInSteps(Protocol):
    """A method that does something in every optimizer step (AdaLoRA's rank budget)."""

    def penalty(self) -> torch.Tensor:
        """Scalar with gradient that is added to the loss once a step, whatever the batch."""
        ...

    def before_step(self) -> None:
        """Gradients of the step are whole, averaged and clipped."""
        ...

    def after_step(self, step: int, total_steps: int) -> None:
        """The optimizer has stepped for the ``step``-th time; parameters may be changed."""
        ...

    def state(self) -> Mapping[str, torch.Tensor]:
        """What it must have back to go on, equal on all ranks; shares storage with the method."""
        ...


class Quantizer(Protocol):
    """How the weights of frozen linears are kept."""

    def quantize(
        self, model: nn.Module, spec: ModelSpec, stored_name: Renamer
    ) -> Mapping[str, int]:
        """Replace frozen linears of a model on the meta device, in place; count by type.

        ``stored_name`` tells the name in the checkpoint, by which linears are skipped.
        ConfigError for a name in ``quant.skip`` that matches nothing.
        """
        ...

    def cache(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Keep weights of a loaded model dequantised to the compute dtype as well, if asked to."""
        ...

    def source(self, weights: TensorSource) -> TensorSource:
        """``weights`` with the bytes of what ``quantize`` replaced, made while they are read.

        The float weight of a quantised linear can be read as well: as the model computes with it.
        """
        ...
