"""Full fine-tuning: nothing is added, everything is trained."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin

from dtune.peft.base import Method, count_parameters
from dtune.peft.export import ModelPlan, model_source, save_model
from dtune.peft.schema.full import FullConfig
from dtune.runtime.tensors import TensorEntry
from dtune.types import InjectReport, ModelSpec, TensorSource


class Full(Method):
    """Every parameter is trained, and saved with the stored buffers, in Hugging Face's layout."""

    export_name = "model"

    def __init__(self, config: FullConfig) -> None:
        self.config = config

    def inject(self, model: nn.Module, spec: ModelSpec) -> InjectReport:
        """Let gradients flow everywhere."""
        for parameter in model.parameters():
            assert parameter.is_floating_point(), "full fine-tuning of a quantised model"
            parameter.requires_grad_(True)
        generation: GenerationConfig | None = None
        if isinstance(model, GenerationMixin):
            generation = model.generation_config
        self._model, self._buffers = model, spec.buffers
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
        architecture = type(model).__name__
        self.plan = ModelPlan(spec.config, generation, architecture, dtype, entries)
        trainable, total = count_parameters(model)
        return InjectReport("full", {}, trainable, total)

    def save(self, tensors: Iterator[tuple[str, torch.Tensor | None]], folder: str) -> None:
        """Write the model as ``from_pretrained`` reads it, in the dtype of its base."""
        buffers = ((name, self._model.get_buffer(name)) for name in self._buffers)
        save_model(chain(tensors, buffers), Path(folder), self.plan)

    def saved(self, folder: str) -> TensorSource:
        """What ``save`` wrote."""
        return model_source(Path(folder))
