"""Random weights that depend on nothing but the seed and the name of the tensor."""

from __future__ import annotations

import copy
import hashlib

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


class RandomSource:
    """Hugging Face's initialisation of an architecture, tensor by tensor.

    Each tensor is drawn in fp32 from a generator of its own, seeded by name and seed, so values
    depend neither on the engine nor on how many ranks read them. Holds the last tensor read.
    """

    def __init__(self, config: PretrainedConfig, seed: int) -> None:
        own = copy.deepcopy(config)  # building writes the attention into it
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(own, attn_implementation="eager")
        self._seed = seed
        self._owners: dict[str, tuple[nn.Module, str, PreTrainedModel]] = {}
        nearest: dict[str, PreTrainedModel] = {}
        for path, module in model.named_modules():
            nearest[path] = (
                module if isinstance(module, PreTrainedModel) else nearest[path.rpartition(".")[0]]
            )
            for leaf, _ in module.named_parameters(recurse=False):
                name = f"{path}.{leaf}" if path else leaf
                self._owners[name] = (module, leaf, nearest[path])
        self._last = ""
        self._values = torch.empty(0)

    def __contains__(self, name: str) -> bool:
        return name in self._owners

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        module, leaf, _ = self._owners[name]
        return tuple(module.get_parameter(leaf).shape)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the row-major flattened tensor: 1-D, CPU, fp32."""
        if name != self._last:
            self._last, self._values = name, torch.empty(0)  # frees the last one before drawing
            self._values = self._draw(name)
        return self._values[start:stop]

    def _draw(self, name: str) -> torch.Tensor:
        module, leaf, owner = self._owners[name]
        clone = copy.copy(module)
        # NaN in one tensor shows an initialiser that skips it; siblings stay on meta.
        value = torch.full(self.shape(name), torch.nan)
        clone._parameters = {**module._parameters, leaf: nn.Parameter(value, requires_grad=False)}
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(digest[:7], "little"))
            owner._init_weights(clone)
        assert not value.isnan().any(), f"{type(owner).__name__} does not initialise {name}"
        return value.flatten()
