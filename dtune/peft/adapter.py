"""Bottleneck adapters, in sequence with parts of a block or beside its MLP.

Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2020, arXiv:2005.00247; He et al. 2021,
arXiv:2110.04366, whose table 1 has all three as one formula.

Shape legend: D hidden size, M bottleneck; leading dims are any.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dtune.errors import ConfigError
from dtune.peft.base import (
    Initializer,
    InitialSource,
    Method,
    count_parameters,
    freeze,
    replace_module,
)
from dtune.peft.export import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterPlan,
    Write,
    adapter_source,
    not_a_lora,
    stored_path,
    stream_tensors,
)
from dtune.peft.schema.adapter import Activation, AdapterConfig, Kind
from dtune.runtime.logs import log
from dtune.runtime.tensors import TensorEntry, TensorWriter
from dtune.types import InjectReport, LinearLike, ModelSpec, Role, TensorSource

PEFT_TYPE = "BOTTLENECK"
"""Of ``adapter_config.json``: a type of our own, which HF ``peft`` does not have."""
DECISIVE = ("kind", "bottleneck", "activation", "scale", "adapted_modules")
"""Fields of ``adapter_config.json`` without which the tensors mean something else."""

ACTIVATIONS: Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.relu: F.relu,
    Activation.gelu: F.gelu,
    Activation.silu: F.silu,
}


class Bottleneck(nn.Module):
    """scale * up(dropout(act(down(x)))), in the dtype of its parameters or of autocast.

    ``down`` [M, D] and ``up`` [D, M] have biases and are fp32 masters, which an engine may put
    into a lower compute dtype.
    """

    def __init__(self, features: int, config: AdapterConfig, *, device: torch.device) -> None:
        super().__init__()
        settings: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.down = nn.Linear(features, config.bottleneck, **settings)
        self.up = nn.Linear(config.bottleneck, features, **settings)
        self.activation, self.dropout, self.scale = config.activation, config.dropout, config.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., D], in the dtype of ``x``."""
        given = x.dtype
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.down.weight.dtype)
        hidden = ACTIVATIONS[self.activation](self.down(x))  # [..., M]
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout, self.training)
        update: torch.Tensor = self.up(hidden)
        return (update * self.scale).to(given)

    def extra_repr(self) -> str:
        """Shown in the printed model."""
        return f"{self.activation.value}, dropout={self.dropout}, scale={self.scale}"


class SequentialAdapter(nn.Module):
    """A frozen linear-like ``base`` with an adapter of its output: y + adapter(y), y = base(x)."""

    def __init__(self, base: nn.Module, adapter: Bottleneck) -> None:
        super().__init__()
        assert isinstance(base, LinearLike), type(base)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.base, self.adapter = base, adapter

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., D], in the dtype of the base's output."""
        y: torch.Tensor = self.base(x)
        result: torch.Tensor = y + self.adapter(y)
        return result


class ParallelAdapter(nn.Module):
    """A frozen MLP ``base`` with an adapter beside it: base(x) + adapter(x)."""

    def __init__(self, base: nn.Module, adapter: Bottleneck) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., D] -> [..., D], in the dtype of the MLP's output; further arguments are its own."""
        y = self.base(x, *args, **kwargs)
        assert isinstance(y, torch.Tensor), f"{type(self.base).__name__} returns {type(y).__name__}"
        update: torch.Tensor = self.adapter(x)
        return y + update.to(y.dtype)


class Adapter(Method):
    """Adapters in every block, found by the roles of its linears; all else is frozen."""

    export_name = "adapter"

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config

    def inject(self, model: nn.Module, spec: ModelSpec) -> InjectReport:
        """Wrap in place. ConfigError for a block whose attention or MLP has another structure."""
        config = self.config
        self._spec = spec
        self._adapted = plan_adapted(model, spec, config.kind)
        self._shapes: dict[str, tuple[int, ...]] = {}
        freeze(model)
        wrapper = ParallelAdapter if config.kind is Kind.parallel else SequentialAdapter
        for path, features in self._adapted.items():
            base = model.get_submodule(path)
            adapter = Bottleneck(features, config, device=next(base.parameters()).device)
            replace_module(model, path, wrapper(base, adapter))
            self._shapes.update(
                (f"{path}.adapter.{name}", tuple(parameter.shape))
                for name, parameter in adapter.named_parameters()
            )
        log.warning("%s", not_a_lora("peft=adapter", can_be_merged=False))
        trainable, total = count_parameters(model)
        return InjectReport("adapter", {wrapper.__name__: len(self._adapted)}, trainable, total)

    def source(self, stored: TensorSource, held: TensorSource, seed: int) -> TensorSource:
        """``down`` is Kaiming-uniform with a = sqrt(5), all else zeros: the start is the base."""
        return InitialSource(self._shapes, _initializer, seed=seed)

    def stored_name(self, name: str) -> str:
        """The name without the wrapper: ``mlp.base.up_proj.weight`` is ``mlp.up_proj.weight``."""
        path, separator, rest = name.partition(".base.")
        return f"{path}.{rest}" if separator and path in self._adapted else name

    def exported_bytes(self) -> int:
        """Of the adapter."""
        return self._plan().num_bytes

    def save(self, tensors: Iterator[tuple[str, torch.Tensor | None]], folder: str) -> None:
        """Write adapter_config.json and adapter_model.safetensors, laid out as ``peft`` does."""
        plan = self._plan()
        shapes = {plan.keys[name]: shape for name, shape in plan.shapes.items()}
        entries = {key: TensorEntry(torch.float32, shape) for key, shape in shapes.items()}

        def start(stack: ExitStack, temporary: Path) -> Write:
            # By hand: peft writes the configs of the methods that it knows.
            text = json.dumps(plan.fields, indent=2, sort_keys=True)
            (temporary / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
            path = temporary / ADAPTER_WEIGHTS
            writer = stack.enter_context(TensorWriter(path, entries, metadata={"format": "pt"}))
            return lambda name, tensor: writer.write(plan.keys[name], tensor)

        stream_tensors(tensors, Path(folder), start)

    def saved(self, folder: str) -> TensorSource:
        """What ``save`` wrote. ConfigError where its settings are not these."""
        return adapter_source(Path(folder), self._plan())

    def _plan(self) -> AdapterPlan:
        config = self.config
        fields: dict[str, object] = {
            "peft_type": PEFT_TYPE,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": stored_path(self._spec.path),
            "inference_mode": True,
            "kind": config.kind.value,
            "bottleneck": config.bottleneck,
            "activation": config.activation.value,
            "dropout": config.dropout,
            "scale": config.scale,
            "adapted_modules": list(self._adapted),
        }
        keys = {name: f"base_model.model.{name}" for name in self._shapes}
        advice = {key: f"turn peft.{key}" for key in DECISIVE[:-1]}
        return AdapterPlan(fields, keys, self._shapes, decisive=DECISIVE, advice=advice)


def plan_adapted(model: nn.Module, spec: ModelSpec, kind: Kind) -> dict[str, int]:
    """Dotted path of every module to be wrapped -> its output features, in order of blocks.

    For sequential kinds the output projections of attention and MLP, for parallel ones the MLP.
    """
    roles = (Role.attention, Role.mlp) if kind is Kind.houlsby else (Role.mlp,)
    adapted: dict[str, int] = {}
    for block, module in model.named_modules():
        if isinstance(module, spec.block_types):
            for role in roles:
                owner, last = _output(model, spec, block, role)
                path = owner if kind is Kind.parallel else last
                adapted[path] = spec.config.get_text_config().hidden_size
    return adapted


def _output(model: nn.Module, spec: ModelSpec, block: str, role: Role) -> tuple[str, str]:
    """Paths of a block's attention or MLP, and of the linear in it that computes its result.

    That is the last one with as many outputs as the hidden state has features, directly below
    the module that holds all linears of the role: not one of several experts.
    """
    hidden = spec.config.get_text_config().hidden_size
    linears = [
        path for path, own in spec.linears.items() if own is role and path.startswith(f"{block}.")
    ]
    fitting = [p for p in linears if _outputs(model.get_submodule(p)) == hidden]
    owner = _common_parent(linears)
    last = fitting[-1] if fitting else ""
    if owner in ("", block) or last.rpartition(".")[0] != owner:
        raise ConfigError(
            f"peft=adapter: {block} of {spec.family} ({spec.path}) has no {role.value} that ends "
            f"in one linear with {hidden} outputs; use peft=lora"
        )
    return owner, last


def _outputs(linear: nn.Module) -> int:
    assert isinstance(linear, LinearLike), type(linear)
    return linear.out_features


def _common_parent(paths: list[str]) -> str:
    """Path of the innermost module around all of these; empty for none."""
    parents = [path.split(".")[:-1] for path in paths]
    shared = []
    for parts in zip(*parents, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _initializer(name: str) -> Initializer:
    return _kaiming if name.endswith(".down.weight") else _zeros


def _zeros(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.zeros(shape)


def _kaiming(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
