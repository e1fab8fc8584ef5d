"""LoRA, Hu et al. 2021, arXiv:2106.09685. Equal to HF ``peft`` in forward, gradient and file.

The update is scaled before B and not after it: bit-equal where the scale is a power of two.

Shape legend: R rank, D input features, O output features; leading dims are any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

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
    AdapterPlan,
    adapter_source,
    save_adapter,
    serving_problems,
    stored_path,
)
from dtune.peft.factors import (
    FactorSource,
    HalfSource,
    RestSource,
    StartingFactors,
    decompose_olora,
    decompose_pissa,
    double,
)
from dtune.peft.schema.lora import LoraConfig, LoraInit, LowRankConfig
from dtune.peft.targets import plan_targets
from dtune.peft.tokens import FIELD, TokenRows
from dtune.runtime.logs import log
from dtune.types import InjectReport, LinearLike, ModelSpec, TensorSource

DECISIVE = {
    "use_dora": "turn peft=dora",
    "use_rslora": "turn peft=rslora",
    "r": "turn peft.rank",
    "lora_alpha": "turn peft.alpha",
    "bias": "such an adapter cannot be read",
    "fan_in_fan_out": "such an adapter cannot be read",
    "rank_pattern": "such an adapter cannot be read",
    "alpha_pattern": "such an adapter cannot be read",
    FIELD: "turn model.added_tokens",
}
"""Fields of ``adapter_config.json`` without which the tensors mean something else."""


class LoraLinear(nn.Module):
    """base(x) + scale * B A dropout(x), with a frozen linear-like ``base``.

    ``lora_A`` [R, D] and ``lora_B`` [O, R] are fp32 masters. An engine may put them into a lower
    compute dtype; without autocast the adapter computes in the dtype its parameters then have,
    and its result is added in the dtype of the base's output.
    """

    base: nn.Module
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
        # Scaled where there are R features and not O: the output is passed over once less.
        hidden = F.linear(x, self.lora_A) * self.scale  # [..., R]
        return y + F.linear(hidden, self.lora_B).to(y.dtype)

    def extra_repr(self) -> str:
        """Shown in the printed model."""
        return f"rank={self.rank}, scale={self.scale}, dropout={self.dropout}"


class LowRank(Method):
    """Updates of the linear layers that ``peft.targets`` names; all else is frozen.

    The methods of the family differ in the module that wraps a linear, in its scale, and in
    initial values.
    """

    export_name = "adapter"
    use_rslora = False
    use_dora = False

    def __init__(self, config: LowRankConfig) -> None:
        self.config = config
        self._targets: list[str] = []
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._wrapped: dict[str, LoraLinear] = {}
        self._tokens = TokenRows()

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.config.alpha / self.config.rank

    def wrap(self, base: nn.Module) -> LoraLinear:
        """The module that takes the place of a target."""
        config = self.config
        return LoraLinear(base, rank=config.rank, scale=self.scale, dropout=config.dropout)

    def inject(self, model: nn.Module, spec: ModelSpec) -> InjectReport:
        """Wrap the targets in place. ConfigError for a target that matches nothing."""
        self._spec = spec
        self._targets = plan_targets(model, spec, self.config.targets)
        freeze(model)
        for path in self._targets:
            wrapped = self.wrap(model.get_submodule(path))
            replace_module(model, path, wrapped)
            self._wrapped[path] = wrapped
            for leaf, parameter in wrapped.named_parameters(recurse=False):
                self._shapes[f"{path}.{leaf}"] = tuple(parameter.shape)
        self._tokens = TokenRows.inject(model, spec)
        self._shapes.update(self._tokens.shapes)
        for problem in serving_problems(self._plan().fields):
            log.warning("%s", problem)
        kind = type(wrapped).__name__
        trainable, total = count_parameters(model)
        replaced = {kind: len(self._targets), **self._tokens.replaced}
        return InjectReport(self.config.name, replaced, trainable, total)

    def source(self, stored: TensorSource, held: TensorSource, seed: int) -> TensorSource:
        """A as Kaiming-uniform with a = sqrt(5), B as zeros: the model starts equal to its base."""
        shapes = {n: s for n, s in self._shapes.items() if n.endswith((".lora_A", ".lora_B"))}
        return self._tokens.source(stored, InitialSource(shapes, _initializer, seed=seed))

    def stored_name(self, name: str) -> str:
        """The name without the wrapper: ``q_proj.base.weight`` is stored as ``q_proj.weight``."""
        path, separator, leaf = name.rpartition(".base.")
        if separator and path in self._wrapped:
            return f"{path}.{leaf}"
        return self._tokens.stored_name(name)

    def exported_bytes(self) -> int:
        """Of the adapter."""
        return self._plan().num_bytes

    def save(self, tensors: Iterator[tuple[str, torch.Tensor | None]], folder: str) -> None:
        """Write adapter_config.json and adapter_model.safetensors, as ``peft`` reads them."""
        save_adapter(tensors, Path(folder), self._plan())

    def saved(self, folder: str) -> TensorSource:
        """What ``save``, or ``peft``, wrote. ConfigError where its settings are not these."""
        return adapter_source(Path(folder), self._plan())

    def _plan(self) -> AdapterPlan:
        fields: dict[str, object] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": stored_path(self._spec.path),
            "inference_mode": True,
            "r": self.config.rank,
            "lora_alpha": _whole(self.config.alpha),
            "lora_dropout": self.config.dropout,
            "target_modules": self._peft_targets(),
            "bias": "none",
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "fan_in_fan_out": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            **self._tokens.fields(),
        }
        keys = {name: _key(name) for name in self._shapes} | self._tokens.keys()
        return AdapterPlan(fields, keys, self._shapes, tuple(DECISIVE), advice=DECISIVE)

    def _peft_targets(self) -> list[str]:
        """Names as ``peft`` matches them: last components where those say it all, else paths."""
        leaves = sorted({path.rpartition(".")[2] for path in self._targets})
        named = [path for path in self._spec.linears if path.rpartition(".")[2] in leaves]
        return leaves if named == self._targets else self._targets


class Lora(LowRank):
    """LoRA, with ``peft.init`` also PiSSA and OLoRA.

    Those two train a part of the base, and freeze what is left. They are saved as an update of
    the whole base: a LoRA of twice the rank, [B, -B0] [A; A0], with the same scale.
    """

    config: LoraConfig

    def __init__(self, config: LoraConfig) -> None:
        super().__init__(config)
        self._start: StartingFactors | None = None

    def inject(self, model: nn.Module, spec: ModelSpec) -> InjectReport:
        """Wrap the targets in place. ConfigError for a target that matches nothing."""
        report = super().inject(model, spec)
        if self._takes_part_of_base:
            self._check_init(spec)
        return report

    @property
    def _takes_part_of_base(self) -> bool:
        return self.config.init is not LoraInit.default

    def _check_init(self, spec: ModelSpec) -> None:
        init, rank = self.config.init.value, self.config.rank
        tied = {*spec.tied, *spec.tied.values()}
        bytes_already = frozenset() if spec.quantized is None else spec.quantized.linears
        for path, wrapped in self._wrapped.items():
            smallest = min(wrapped.in_features, wrapped.out_features)
            if rank > smallest:
                raise ConfigError(
                    f"peft.rank={rank}: {path} has no more than {smallest} directions for "
                    f"peft.init={init}; set peft.rank={smallest} or less, or peft.init=default"
                )
            if path in bytes_already:
                raise ConfigError(
                    f"model.path={spec.path} holds {path} quantised already, and peft.init={init} "
                    "takes a part out of the float weight first; set peft.init=default, or give "
                    "the model as it was before it was quantised"
                )
            if f"{path}.weight" in tied:
                raise ConfigError(
                    f"peft.targets: the weight of {path} is also the embedding, which "
                    f"peft.init={init} would change; leave it out of peft.targets, or set "
                    "peft.init=default"
                )

    def base(self, stored: TensorSource) -> TensorSource:
        """The weights as they are stored; PiSSA and OLoRA: without what A and B start with."""
        if not self._takes_part_of_base:
            return stored
        config = self.config
        decompose = decompose_olora(config.rank)
        if config.init is LoraInit.pissa:
            decompose = decompose_pissa(
                config.rank, scale=self.scale, iterations=config.svd_iterations
            )
        weights = {path: f"{path}.base.weight" for path in self._targets}
        self._start = StartingFactors(stored, weights, decompose, scale=self.scale)
        return RestSource(stored, {name: path for path, name in weights.items()}, self._start)

    def source(self, stored: TensorSource, held: TensorSource, seed: int) -> TensorSource:
        """A as Kaiming-uniform with a = sqrt(5), B as zeros; or what ``base`` has left out."""
        if not self._takes_part_of_base:
            return super().source(stored, held, seed)
        assert self._start is not None, "base comes first"
        return self._tokens.source(stored, FactorSource(self._shapes, self._start))

    def save(self, tensors: Iterator[tuple[str, torch.Tensor | None]], folder: str) -> None:
        """Write adapter_config.json and adapter_model.safetensors, as ``peft`` reads them."""
        super().save(map(self._doubled, tensors) if self._takes_part_of_base else tensors, folder)

    def _doubled(self, item: tuple[str, torch.Tensor | None]) -> tuple[str, torch.Tensor | None]:
        name, values = item
        if values is None or not name.endswith((".lora_A", ".lora_B")):
            return item
        assert self._start is not None, "base comes first"
        return name, double(name, values, self._start.factors(name.rpartition(".")[0]))

    def saved(self, folder: str) -> TensorSource:
        """What ``save``, or ``peft``, wrote. ConfigError where its settings are not these."""
        source = super().saved(folder)
        return HalfSource(source, self._shapes) if self._takes_part_of_base else source

    def _plan(self) -> AdapterPlan:
        plan = super()._plan()
        if not self._takes_part_of_base:
            return plan
        rank = 2 * self.config.rank
        # The scale stays what it is: alpha over the rank, or over its root.
        alpha = self.config.alpha * (math.sqrt(2) if self.use_rslora else 2)
        fields = {**plan.fields, "r": rank, "lora_alpha": _whole(alpha)}
        shapes = {name: _with_rank(name, shape, rank) for name, shape in plan.shapes.items()}
        settings = {"peft.init": self.config.init.value}
        if self.config.init is LoraInit.pissa:
            settings["peft.svd_iterations"] = str(self.config.svd_iterations)
        twice = "turn peft.{}; with peft.init other than default a file has more than that of it"
        advice = {**DECISIVE, "r": twice.format("rank"), "lora_alpha": twice.format("alpha")}
        return AdapterPlan(fields, plan.keys, shapes, plan.decisive, advice, settings)


def _key(name: str) -> str:
    """Key in the file: peft has a module for each factor, and none for DoRA's magnitude."""
    suffix = "" if name.endswith(".lora_magnitude_vector") else ".weight"
    return f"base_model.model.{name}{suffix}"


def _with_rank(name: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    if name.endswith(".lora_A"):
        return (rank, shape[1])
    return (shape[0], rank) if name.endswith(".lora_B") else shape


def _whole(alpha: float) -> float:
    """Without a fraction where there is none: as peft writes it."""
    return int(alpha) if float(alpha).is_integer() else alpha


def _initializer(name: str) -> Initializer:
    return _zeros if name.endswith(".lora_B") else _kaiming


def _zeros(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.zeros(shape)


def _kaiming(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
