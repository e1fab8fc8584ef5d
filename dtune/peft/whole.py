"""Methods that train parameters of the base itself, and export a whole model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin

from dtune.errors import ConfigError
from dtune.peft.base import Method, count_parameters
from dtune.peft.export import ModelPlan, model_source, save_model
from dtune.runtime.tensors import TensorEntry
from dtune.types import InjectReport, ModelSpec, TensorSource

# Elements of each frozen tensor by which a model is known to be of the same base.
COMPARED = 256
# Elements that are compared at once where all of them are.
_PIECE = 1 << 22


class WholeModel(Method, ABC):
    """Trains what ``plan_trained`` names and freezes the rest; nothing is added or replaced.

    What is exported is a model in Hugging Face's layout, in the dtype of its base: parameters
    that were trained, those that were not, and the stored buffers.
    """

    export_name = "model"
    name: str
    _stored: TensorSource | None = None
    _held: TensorSource | None = None

    def inject(self, model: nn.Module, spec: ModelSpec) -> InjectReport:
        """Let gradients flow to what is trained. ConfigError where nothing would be."""
        trained = self.plan_trained(model, spec)
        for name, parameter in model.named_parameters():
            assert parameter.is_floating_point(), f"{name} is quantised already"
            parameter.requires_grad_(name in trained)
        self._trained = trained
        self._model, self._buffers = model, spec.buffers
        self._embeddings = frozenset(
            f"{path}.weight" for path, m in model.named_modules() if isinstance(m, nn.Embedding)
        )
        self.plan = plan_model(model, spec)
        trainable, total = count_parameters(model)
        return InjectReport(self.name, {}, trainable, total)

    @abstractmethod
    def plan_trained(self, model: nn.Module, spec: ModelSpec) -> frozenset[str]:
        """Names of the parameters that are trained, of a shared one the first; not empty."""

    def exported_bytes(self) -> int:
        """Of the model."""
        return sum(entry.num_bytes for entry in self.plan.entries.values())

    def save(self, tensors: Iterator[tuple[str, torch.Tensor | None]], folder: str) -> None:
        """Write the model as ``from_pretrained`` reads it; ``tensors`` are all its parameters."""
        buffers = ((name, self._model.get_buffer(name)) for name in self._buffers)
        save_model(chain(tensors, buffers), Path(folder), self.plan)

    def source(self, stored: TensorSource, held: TensorSource, seed: int) -> TensorSource:
        """Nothing: every value comes from the base, which ``saved`` then compares with."""
        self._stored, self._held = stored, held
        return super().source(stored, held, seed)

    def saved(self, folder: str) -> TensorSource:
        """What was trained of a model that ``save`` wrote; the rest is the base's.

        ConfigError where the rest is not the base's, or a tensor is missing or of another shape.
        """
        source = model_source(Path(folder))
        for name, entry in self.plan.entries.items():
            if name not in source:
                raise ConfigError(f"{folder} holds no {name}: it is no model of this architecture")
            if source.shape(name) != entry.shape:
                raise ConfigError(
                    f"{folder}: {name} has shape {source.shape(name)}, expected {entry.shape}"
                )
            if name not in self._trained and not self._is_of_base(source, name):
                raise ConfigError(
                    f"{folder}: {name} is not the base's, and peft={self.name} with these settings "
                    "does not train it; to go on from that model as a whole set model.path to it "
                    "and peft.init_from=none"
                )
        return _Part(source, self._trained)

    def _is_of_base(self, source: TensorSource, name: str) -> bool:
        """Whether a tensor begins as the base's: as it is stored, or as quantised and back."""
        size = math.prod(source.shape(name))
        if name not in self._embeddings:
            return self._agrees(source, name, 0, min(COMPARED, size))
        # All of it: rows of tokens that were not in the data are the base's though it was trained.
        starts = range(0, size, _PIECE)
        return all(self._agrees(source, name, at, min(at + _PIECE, size)) for at in starts)

    def _agrees(self, source: TensorSource, name: str, start: int, stop: int) -> bool:
        if self._stored is None or self._held is None:
            return True
        found = source.read(name, start, stop)
        stored = self._stored.read(name, start, stop).to(found.dtype)
        if torch.equal(found, stored):
            return True
        held = self._held.read(name, start, stop).to(found.dtype)
        if torch.equal(stored, held):
            return False
        # Another kind of device may round the way back from bytes otherwise.
        return torch.allclose(found.float(), held.float(), rtol=2**-7, atol=0.0)


class _Part:
    """Some tensors of a source."""

    def __init__(self, source: TensorSource, names: frozenset[str]) -> None:
        self._source, self._names = source, names

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._source.shape(name)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements of the flattened tensor, as stored."""
        return self._source.read(name, start, stop)


def plan_model(model: nn.Module, spec: ModelSpec) -> ModelPlan:
    """The files of a model as it is stored: before quantisation, without names that are shared."""
    generation: GenerationConfig | None = None
    if isinstance(model, GenerationMixin):
        generation = model.generation_config
    dtype = spec.stored_dtype or spec.config.dtype or torch.float32
    assert isinstance(dtype, torch.dtype), dtype
    entries = {
        name: TensorEntry(dtype, tuple(parameter.shape))
        for name, parameter in model.named_parameters()
        if name not in spec.tied
    }
    for name in spec.buffers:
        # As the model holds it: a few numbers, some of which are fp32 in a bf16 model.
        buffer = model.get_buffer(name)
        entries[name] = TensorEntry(buffer.dtype, tuple(buffer.shape))
    return ModelPlan(spec.config, generation, type(model).__name__, dtype, entries)
