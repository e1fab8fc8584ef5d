"""LoRA, Hu et al. 2021, arXiv:2106.09685. Equal to HF ``peft`` in forward, gradient and file.

Shape legend: R rank, D input features, O output features; leading dims are any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from dtune.peft.base import (
    Initializer,
    InitialSource,
    LinearLike,
    Method,
    count_parameters,
    freeze,
    replace_module,
)
from dtune.peft.export import AdapterPlan, adapter_source, save_adapter, stored_path
from dtune.peft.schema.lora import LoraConfig
from dtune.peft.targets import plan_targets
from dtune.types import InjectReport, ModelSpec, TensorSource

DECISIVE = (
    "r",
    "lora_alpha",
    "bias",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
)
"""Fields of ``adapter_config.json`` without which the tensors mean something else."""


class LoraLinear(nn.Module):
    """base(x) + scale * B A dropout(x), with a frozen linear-like ``base``.

    ``lora_A`` [R, D] and ``lora_B`` [O, R] are fp32 masters. An engine may put them into a lower
    compute dtype; without autocast the adapter computes in the dtype its parameters then have,
    and its result is added in the dtype of the base's output.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, base: nn.Module, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        assert isinstance(base, LinearLike), type(base)
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.scale, self.dropout = rank, scale, dropout
        device = next(base.parameters()).device
        shape_A, shape_B = (rank, base.in_features), (base.out_features, rank)
        self.lora_A = nn.Parameter(torch.empty(shape_A, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.empty(shape_B, dtype=torch.float32, device=device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., O], in the dtype of the base's output."""
        y: torch.Tensor = self.base(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        update = F.linear(F.linear(x, self.lora_A), self.lora_B)  # [..., R], [..., O]
        return y + (update * self.scale).to(y.dtype)

    def extra_repr(self) -> str:
        """Shown in the printed model."""
        return f"rank={self.rank}, scale={self.scale}, dropout={self.dropout}"


class Lora(Method):
    """Low-rank updates of the linear layers that ``peft.targets`` names; all else is frozen."""

    export_name = "adapter"

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        self._targets: list[str] = []
        self._shapes: dict[str, tuple[int, ...]] = {}

    def inject(self, model: nn.Module, spec: ModelSpec) -> InjectReport:
        """Wrap the targets in place. ConfigError for a target that matches nothing."""
        config = self.config
        self._spec = spec
        self._targets = plan_targets(model, spec, config.targets)
        freeze(model)
        for path in self._targets:
            base = model.get_submodule(path)
            scale = config.alpha / config.rank
            wrapped = LoraLinear(base, rank=config.rank, scale=scale, dropout=config.dropout)
            replace_module(model, path, wrapped)
            self._shapes[f"{path}.lora_A"] = tuple(wrapped.lora_A.shape)
            self._shapes[f"{path}.lora_B"] = tuple(wrapped.lora_B.shape)
        trainable, total = count_parameters(model)
        return InjectReport("lora", {"LoraLinear": len(self._targets)}, trainable, total)

    def source(self, stored: TensorSource, held: TensorSource, seed: int) -> TensorSource:
        """A as Kaiming-uniform with a = sqrt(5), B as zeros: the model starts equal to its base."""
        return InitialSource(self._shapes, _initializer, seed=seed)

    def stored_name(self, name: str) -> str:
        """The name without the wrapper: ``q_proj.base.weight`` is stored as ``q_proj.weight``."""
        path, separator, leaf = name.rpartition(".base.")
        return f"{path}.{leaf}" if separator and path in self._targets else name

    def save(self, tensors: Iterator[tuple[str, torch.Tensor | None]], folder: str) -> None:
        """Write adapter_config.json and adapter_model.safetensors, as ``peft`` reads them."""
        save_adapter(tensors, Path(folder), self._plan())

    def saved(self, folder: str) -> TensorSource:
        """What ``save``, or ``peft``, wrote. ConfigError where its settings are not these."""
        return adapter_source(Path(folder), self._plan())

    def _plan(self) -> AdapterPlan:
        alpha = self.config.alpha
        fields: dict[str, object] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": stored_path(self._spec.path),
            "inference_mode": True,
            "r": self.config.rank,
            "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
            "lora_dropout": self.config.dropout,
            "target_modules": self._peft_targets(),
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "fan_in_fan_out": False,
            "rank_pattern": {},
            "alpha_pattern": {},
        }
        keys = {name: f"base_model.model.{name}.weight" for name in self._shapes}
        return AdapterPlan(fields, keys, self._shapes, decisive=DECISIVE)

    def _peft_targets(self) -> list[str]:
        """Names as ``peft`` matches them: last components where those say it all, else paths."""
        leaves = sorted({path.rpartition(".")[2] for path in self._targets})
        named = [path for path in self._spec.linears if path.rpartition(".")[2] in leaves]
        return leaves if named == self._targets else self._targets


def _initializer(name: str) -> Initializer:
    return _zeros if name.endswith(".lora_B") else _kaiming


def _zeros(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.zeros(shape)


def _kaiming(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
