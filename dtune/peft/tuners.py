"""Methods whose layers are those of HF ``peft``: injected on meta, valued, named and saved.

Everything that ``peft`` knows of the model's storage stays out of the way: it sees plain linears
while it injects, and afterwards its layers only call what is then in their place.
"""

from __future__ import annotations

import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from dtune.errors import ConfigError
from dtune.peft.base import Method, count_parameters
from dtune.peft.export import (
    AdapterPlan,
    adapter_source,
    not_a_lora,
    save_adapter,
    stored_path,
)
from dtune.peft.targets import plan_targets
from dtune.runtime.logs import log
from dtune.types import InjectReport, ModelSpec, TensorSource

ADAPTER = "default"
"""What ``peft`` calls the one adapter of a model."""

NEUTRAL = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "d_initial",
        "inference_mode",
        "peft_version",
        "revision",
        "target_modules",
        "task_type",
    }
)
"""Fields of a ``peft`` config that do not change what saved tensors mean."""


@contextmanager
def keeping_compilers() -> Iterator[None]:
    """Leave CC and CXX as they are; around what ``peft`` does.

    BOFT sets both to gcc while it builds an extension, and leaves that behind where it cannot
    build it: torch.compile, which takes CXX, would link C++ without its library.
    """
    before = {name: os.environ.get(name) for name in ("CC", "CXX")}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class TensorsSource:
    """A TensorSource over tensors in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, on the CPU."""
        return self._tensors[name].reshape(-1)[start:stop]


class Tuner(Method, ABC):
    """Layers of ``peft`` around the linear layers that ``peft.targets`` names.

    A subclass says which: ``key`` is what its errors begin with, ``peft_config`` the settings.
    """

    export_name = "adapter"
    key = "peft"
    harmless: tuple[str, ...] = ("Failed to load the CUDA extension",)
    """Beginnings of warnings of ``peft`` that are not about anything that was set."""
    reads_weight = False
    """Whether its layers compute with the weight of their base, instead of calling the base."""

    def __init__(self, targets: Sequence[str]) -> None:
        self._wanted = list(targets)
        self._paths: list[str] = []
        self._added: dict[str, tuple[int, ...]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._keys: dict[str, str] = {}

    @abstractmethod
    def peft_config(self, targets: list[str]) -> peft.PeftConfig:
        """Settings as ``peft`` takes them. ``targets`` are names as it matches them."""

    def plan(self, model: nn.Module, spec: ModelSpec) -> list[str]:
        """Paths of the modules that get a layer. ConfigError for a target that matches nothing."""
        return plan_targets(model, spec, self._wanted)

    def adapt(self, model: nn.Module) -> None:
        """Change layers that ``peft`` has just put into a model; here they serve as they are."""

    def inject(self, model: nn.Module, spec: ModelSpec) -> InjectReport:
        """Put the layers in, in place. ConfigError where a target or a setting does not fit."""
        self._model, self._spec = model, spec
        self._paths = self.plan(model, spec)
        self._linears = linears_of(model, self._paths)
        before = {name for name, _ in model.named_parameters()}
        self._tuner = self._put_into(model, low_cpu_mem_usage=True)
        self.adapt(model)
        for name, parameter in model.named_parameters():
            if self.stored_name(name) not in before:
                parameter.data = parameter.data.float()
                self._added[name] = tuple(parameter.shape)
        self._keys = keys_of(self._tuner)
        self._buffers = {
            n: tuple(b.shape) for n, b in _named_buffers(self._tuner) if n in self._keys
        }
        trained = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
        stray = sorted(set(trained) - set(self._keys))
        assert not stray, f"trained, but not saved by peft: {stray[0]}"
        self._shapes = trained | self._buffers
        self._fill_buffers(model)
        log.warning("%s", not_a_lora(self.key, can_be_merged=True))
        layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        trainable, total = count_parameters(model)
        name = type(layers[0]).__name__
        return InjectReport(self.key, {name: len(layers)}, trainable, total)

    def stored_name(self, name: str) -> str:
        """The name without the layer: ``q_proj.base_layer.weight`` is stored as ``q_proj.weight``.

        A parameter that was added has no such name, and gets its own.
        """
        path, separator, leaf = name.rpartition(".base_layer.")
        return f"{path}.{leaf}" if separator and path in self._paths else name

    def source(self, stored: TensorSource, held: TensorSource, seed: int) -> TensorSource:
        """What ``peft`` draws, with the run's seed; the same on every rank."""
        self._check_bases()
        return TensorsSource(self.initial(seed))

    def initial(self, seed: int) -> dict[str, torch.Tensor]:
        """First values of what was added, fp32 on the CPU. ConfigError if they follow the base."""
        twin = self._twin(seed)
        values = {name: twin.get_parameter(name).detach().float() for name in self._added}
        self._check_finite(values)
        return values

    def exported_bytes(self) -> int:
        """Of the adapter."""
        return self.adapter_plan().num_bytes

    def save(self, tensors: Iterator[tuple[str, torch.Tensor | None]], folder: str) -> None:
        """Write adapter_config.json and adapter_model.safetensors, as ``peft`` writes them."""
        buffers = ((n, b) for n, b in _named_buffers(self._tuner) if n in self._buffers)
        save_adapter(chain(tensors, buffers), Path(folder), self.adapter_plan())

    def saved(self, folder: str) -> TensorSource:
        """What ``save``, or ``peft``, wrote. ConfigError where its settings are not these."""
        return adapter_source(Path(folder), self.adapter_plan())

    def adapter_plan(self) -> AdapterPlan:
        """The files of the adapter."""
        fields = {
            **plain_fields(self.peft_config(peft_targets(self._paths, self._spec))),
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": stored_path(self._spec.path),
            "inference_mode": True,
        }
        keys = {name: self._keys[name] for name in self._shapes}
        decisive = tuple(sorted(name for name in fields if is_decisive(name)))
        return AdapterPlan(fields, keys, self._shapes, decisive=decisive)

    def _put_into(self, model: nn.Module, *, low_cpu_mem_usage: bool) -> BaseTuner:
        """Have ``peft`` put its layers into a model. ConfigError for what it refuses."""
        with warnings.catch_warnings(record=True) as said, keeping_compilers():
            warnings.simplefilter("always")
            try:
                config = self.peft_config(list(self._paths))
                tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
                made = tuner(model, config, ADAPTER, low_cpu_mem_usage=low_cpu_mem_usage)
            except (
                ValueError,
                TypeError,
                ArithmeticError,
                ImportError,
                NotImplementedError,
            ) as error:
                raise ConfigError(f"{self.key}: HF peft refuses it: {error}") from error
        if low_cpu_mem_usage:
            for text in sorted({str(warning.message) for warning in said}):
                if not text.startswith(self.harmless):
                    log.warning("%s: HF peft says: %s", self.key, text)
        for module in list(made.model.modules()):
            if isinstance(module, BaseTunerLayer) and _float_buffers(module):
                kind: type[nn.Module] = type(module)
                module.__class__ = in_own_dtype(kind)  # type: ignore[arg-type]
        return made

    def _twin(self, seed: int) -> nn.Module:
        """A module of the targets alone, with layers whose values were drawn with a seed."""
        twin = skeleton(self._linears)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._put_into(twin, low_cpu_mem_usage=False)
            self.adapt(twin)
        return twin

    def _fill_buffers(self, model: nn.Module) -> None:
        """Give the buffers of the layers their values: one seed draws them in every run."""
        layers = tuple(f"{path}." for path in self._paths)
        own = [(name, b) for name, b in model.named_buffers() if name.startswith(layers)]
        empty = [name for name, buffer in own if buffer.is_meta]
        if not empty:
            return
        twins = [self._twin(seed) for seed in (0, 1)]
        first, second = ({n: twin.get_buffer(n).detach() for n in empty} for twin in twins)
        self._check_finite(first)
        for name, buffer in first.items():
            if not torch.equal(buffer, second[name]):
                raise ConfigError(f"{self.key}: {name} is drawn anew in every run, and not trained")
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._buffers[leaf] = buffer

    def _check_finite(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, value in values.items():
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ConfigError(
                    f"{self.key}: {name} starts from the weights of the base, which this method "
                    "does not read; set peft=lora, or another peft.type"
                )

    def _check_bases(self) -> None:
        """ConfigError for bytes under a layer that computes with the weight itself."""
        if not self.reads_weight:
            return
        for path in self._paths:
            base = self._model.get_submodule(f"{path}.base_layer")
            if not isinstance(base, nn.Linear):
                raise ConfigError(
                    f"{self.key} computes with the base's weights themselves, and those of {path} "
                    "are kept as bytes; set quant=none, or peft=lora"
                )


def linears_of(model: nn.Module, paths: Sequence[str]) -> dict[str, tuple[int, int, bool]]:
    """Path of a linear -> its features in and out, and whether it has a bias."""
    found = {}
    for path in paths:
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear):
            found[path] = (module.in_features, module.out_features, module.bias is not None)
    return found


def skeleton(linears: Mapping[str, tuple[int, int, bool]]) -> nn.Module:
    """Linears at their paths, all of one element that is not a number: they take no memory."""
    root = nn.Module()
    for path, (inputs, outputs, bias) in linears.items():
        *folders, leaf = path.split(".")
        parent = root
        for folder in folders:
            if folder not in parent._modules:
                parent.add_module(folder, nn.Module())
            parent = parent.get_submodule(folder)
        linear = nn.Linear(inputs, outputs, bias=bias, device="meta", dtype=torch.float32)
        for name, parameter in list(linear.named_parameters()):
            element = torch.full((), torch.nan).expand(parameter.shape)
            setattr(linear, name, nn.Parameter(element, requires_grad=False))
        parent.add_module(leaf, linear)
    return root


def keys_of(tuner: BaseTuner) -> dict[str, str]:
    """Name of a tensor of the model -> its key in the file that ``peft`` writes."""
    whole: Any = nn.Module()  # named as a PeftModel names what is in it
    whole.base_model, whole.peft_config = tuner, tuner.peft_config
    tensors = whole.state_dict(keep_vars=True)
    # By objects that stand for them, because the keys are made by rules of each method. A buffer
    # that layers share may be saved for each of them.
    names: dict[int, list[str]] = {}
    for name, tensor in chain(_named_parameters(tuner), _named_buffers(tuner)):
        names.setdefault(id(tensor), []).append(name)
    kept = peft.get_peft_model_state_dict(whole, state_dict=tensors, save_embedding_layers=False)
    return {names[id(tensor)].pop(0): key for key, tensor in kept.items()}


def _named_parameters(tuner: BaseTuner) -> Iterator[tuple[str, torch.Tensor]]:
    yield from tuner.model.named_parameters()


def _named_buffers(tuner: BaseTuner) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of the model, as often as layers share them, and those that layers share."""
    own: list[tuple[str, torch.Tensor]] = []
    for name, buffer in tuner.named_buffers(remove_duplicate=False):
        if name.startswith("model."):
            yield name.removeprefix("model."), buffer
        else:
            own.append((f"tuner.{name}", buffer))
    yield from own


def peft_targets(paths: Sequence[str], spec: ModelSpec) -> list[str]:
    """Names as ``peft`` matches them: last components where those say it all, else paths."""
    leaves = sorted({path.rpartition(".")[2] for path in paths})
    named = [path for path in spec.linears if path.rpartition(".")[2] in leaves]
    return leaves if named == list(paths) else list(paths)


def plain_fields(config: peft.PeftConfig) -> dict[str, object]:
    """The fields of a ``peft`` config as its file has them."""
    fields: dict[str, object] = json.loads(json.dumps(config.to_dict(), default=_plain))
    return fields


def _plain(value: object) -> object:
    assert isinstance(value, set | frozenset), value
    return sorted(value)


def whole_number(value: float) -> float:
    """An integer where it is one, as ``peft`` has it."""
    return int(value) if value.is_integer() else value


def is_decisive(field: str) -> bool:
    """Whether a field of a ``peft`` config changes what saved tensors mean."""
    return field not in NEUTRAL and "dropout" not in field and not field.startswith("init_")


def _float_buffers(layer: nn.Module) -> bool:
    base = {id(b) for b in layer.get_submodule("base_layer").buffers()}
    own = (buffer for buffer in layer.buffers() if id(buffer) not in base)
    return any(buffer.is_floating_point() for buffer in own)


@cache
def in_own_dtype(layer: type[nn.Module]) -> type[nn.Module]:
    """A class of layers that compute in the dtype of their input although buffers keep theirs.

    Engines that put parameters into a lower dtype leave buffers as they are.
    """

    class InOwnDtype(layer):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            device = x.device.type
            lower = x.dtype != torch.float32 and not torch.is_autocast_enabled(device)
            with torch.autocast(device, dtype=x.dtype) if lower else nullcontext():
                y: torch.Tensor = super().forward(x, *args, **kwargs)
            return y

    InOwnDtype.__name__ = InOwnDtype.__qualname__ = layer.__name__
    return InOwnDtype


def drop_outputs(update: torch.Tensor, probability: float, *, keep_mean: bool) -> torch.Tensor:
    """Leave rows of an update of a weight [O, D] out; ``keep_mean`` scales the others up."""
    kept = (torch.rand(update.shape[0]) > probability).to(update.dtype)
    if keep_mean:
        kept = kept / kept.mean()
    return update * kept.to(update.device)[:, None]
