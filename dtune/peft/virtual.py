"""What the methods of virtual tokens share: an encoder beside the model, another forward, files.

The encoder is HF ``peft``'s own, a child of the model, so that parameters and their maths are
``peft``'s. The model itself stays what engines, patches and generation know: its class becomes a
subclass of what it was.

Shape legend: B rows, S tokens of a row, N virtual tokens, H hidden size of the model.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dtune.errors import ConfigError
from dtune.peft.base import Initializer, InitialSource, Method, count_parameters, freeze
from dtune.peft.export import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterPlan,
    Write,
    adapter_source,
    not_a_lora,
    open_files,
    peft_config,
    save_adapter,
    stored_path,
    stream_tensors,
)
from dtune.runtime.logs import log
from dtune.runtime.tensors import TensorEntry, TensorWriter
from dtune.types import AddsTokens, InjectReport, ModelSpec, TensorSource

ENCODER = "prompt_encoder"
"""Name of the encoder in the model."""
PROMPT_EMBEDDINGS = "prompt_embeddings"
"""Key of what the encoder computes, in ``peft``'s file."""
ENCODER_WEIGHTS = "prompt_encoder.safetensors"
"""What the encoder computes it from: a file of our own, which ``peft`` passes over."""


class WithVirtualTokens(AddsTokens):
    """Trait of a model with an encoder; its forward hands all arguments on by their names."""

    num_virtual_tokens: int
    hooks_before_own: tuple[Callable[..., Any], ...]

    @abstractmethod
    def forward_with_tokens(self, given: dict[str, Any]) -> Any:
        """Forward of the model with virtual tokens; the results of its own tokens."""

    def encoded(self, device: torch.device) -> torch.Tensor:
        """What the encoder makes of the N virtual tokens: [N, ...], in its parameters' dtype."""
        own: Any = self
        # One row: they are the same in every row of a batch. So little that fp32 costs nothing.
        tokens = torch.arange(self.num_virtual_tokens, device=device)[None]
        with torch.autocast(device.type, enabled=False):
            encoded: torch.Tensor = own.get_submodule(ENCODER)(tokens)
        return encoded[0]

    def told(self, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments as the hooks change them that the model's own forward had before."""
        for hook in self.hooks_before_own:
            changed = hook(self, (), given)
            given = given if changed is None else changed[1]
        return given

    def call_own(self, given: dict[str, Any]) -> Any:
        """The forward that the model had before, with the hooks that it had before."""
        own: Any = self
        return own.own_forward(**self.told(given))


def add_encoder(
    model: nn.Module, encoder: nn.Module, trait: type[WithVirtualTokens], num_virtual_tokens: int
) -> None:
    """Give a model an encoder, and the forward of ``trait``, in place.

    Hooks that look at the arguments of the model's forward move with it: what they are about
    (documents, masks) follows from the arguments that its own forward gets.
    """
    own: Any = model
    hooks = own._forward_pre_hooks
    assert all(key in own._forward_pre_hooks_with_kwargs for key in hooks), "hooks of another kind"
    assert ENCODER not in own._modules, "the model has such a module already"
    own.hooks_before_own = tuple(hooks.values())
    hooks.clear()
    own._forward_pre_hooks_with_kwargs.clear()
    own.num_virtual_tokens = num_virtual_tokens
    own.add_module(ENCODER, encoder)
    key = (type(model), trait)
    if key not in _classes:
        _classes[key] = _extended(type(model), trait)
    own.__class__ = _classes[key]


_classes: dict[tuple[type, type], type] = {}
"""Made once for models that are alike."""


def _extended(cls: type[nn.Module], trait: type[WithVirtualTokens]) -> type[nn.Module]:
    names = list(inspect.signature(cls.forward).parameters)[1:]

    # wraps: generation asks a model's forward which arguments it takes.
    @wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.forward_with_tokens({**dict(zip(names, args, strict=False)), **kwargs})

    @wraps(cls.forward)
    def own_forward(self: Any, **kwargs: Any) -> Any:
        return cls.forward(self, **kwargs)

    body = {"forward": forward, "own_forward": own_forward}
    return type(f"{cls.__name__}WithVirtualTokens", (trait, cls), body)


def continues(given: Mapping[str, Any]) -> bool:
    """Whether the arguments bring a cache that has seen the virtual tokens already."""
    past = given.get("past_key_values")
    return past is not None and past.get_seq_length() > 0


def extend_seen(given: dict[str, Any], num: int) -> None:
    """Tell a model about ``num`` tokens that its cache holds before its rows, in place.

    ``attention_mask`` [B, S] becomes [B, num + S]; positions begin after them.
    """
    mask = given.get("attention_mask")
    if mask is not None:
        assert mask.ndim == 2, "masks of scores are made after the virtual tokens are added"
        given["attention_mask"] = torch.cat([mask.new_ones(mask.shape[0], num), mask], dim=1)
    if given.get("position_ids") is not None:
        given["position_ids"] = given["position_ids"] + num


class VirtualTokens(Method, ABC):
    """Virtual tokens before every row; the model itself is frozen."""

    export_name = "adapter"
    # Attention sees the virtual tokens from the first step.
    starts_at_base = False

    name: str
    peft_type: str
    trait: type[WithVirtualTokens]
    decisive: tuple[str, ...]
    """Fields of ``adapter_config.json`` without which the tensors mean something else."""
    num_virtual_tokens: int

    @abstractmethod
    def make_encoder(self) -> nn.Module:
        """``peft``'s encoder, on whatever device is the default."""

    @abstractmethod
    def fields(self, config: PretrainedConfig) -> dict[str, object]:
        """Of ``adapter_config.json``: what only this method has, and ``token_dim`` and heads."""

    def check_model(self, model: PreTrainedModel, spec: ModelSpec) -> None:
        """Raise ConfigError for a model that cannot take the tokens; here every model can."""

    def inject(self, model: nn.Module, spec: ModelSpec) -> InjectReport:
        """Add the encoder. ConfigError for a model that cannot take virtual tokens."""
        assert isinstance(model, PreTrainedModel), type(model)
        self.check_model(model, spec)
        freeze(model)
        config = spec.config.get_text_config()
        self._fields: dict[str, object] = {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": stored_path(spec.path),
            "inference_mode": True,
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_transformer_submodules": 1,
            "num_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "token_dim": config.hidden_size,
            **self.fields(config),
        }
        with next(model.parameters()).device:
            self.encoder = self.make_encoder()
        add_encoder(model, self.encoder, self.trait, self.num_virtual_tokens)
        self.shapes = {
            f"{ENCODER}.{name}": tuple(parameter.shape)
            for name, parameter in self.encoder.named_parameters()
        }
        log.warning("%s", not_a_lora(f"peft={self.name}", can_be_merged=False))
        trainable, total = count_parameters(model)
        replaced = {type(self.encoder).__name__: 1}
        return InjectReport(self.name, replaced, trainable, total)

    def peft_config(self) -> Any:
        """The config that ``peft`` builds the encoder of training from."""
        return peft_config({**self._fields, "inference_mode": False})

    def source(self, stored: TensorSource, held: TensorSource, seed: int) -> TensorSource:
        """As the layers of ``peft``'s encoder are initialised."""
        return InitialSource(self.shapes, self._initializer, seed=seed)

    def _initializer(self, name: str) -> Initializer:
        path = name.removeprefix(f"{ENCODER}.").rpartition(".")[0]
        module = self.encoder.get_submodule(path)
        if isinstance(module, nn.Embedding):
            return _normal
        if isinstance(module, nn.LSTM):
            return _uniform(module.hidden_size)
        assert isinstance(module, nn.Linear), type(module)
        # The weight too: Kaiming-uniform with a = sqrt(5) is this bound.
        return _uniform(module.in_features)

    def _plan(self) -> AdapterPlan:
        """Of ``peft``'s files; without encoder, what is computed is the parameter itself."""
        rows, *_ = next(iter(self.shapes.values()))
        width = self._width()
        names = list(self.shapes) if self._is_plain() else [PROMPT_EMBEDDINGS]
        return AdapterPlan(
            self._fields,
            keys=dict.fromkeys(names, PROMPT_EMBEDDINGS),
            shapes=dict.fromkeys(names, (rows, width)),
            decisive=("num_virtual_tokens", "num_layers", "token_dim", *self.decisive),
        )

    def _is_plain(self) -> bool:
        return len(self.shapes) == 1

    def _width(self) -> int:
        """Features of what the encoder computes for one token."""
        if self._is_plain():
            return next(iter(self.shapes.values()))[1]
        last = [m for m in self.encoder.modules() if isinstance(m, nn.Linear)][-1]
        return last.out_features

    def exported_bytes(self) -> int:
        """Of what is computed, and of the encoder beside it."""
        encoder = [] if self._is_plain() else self.shapes.values()
        return self._plan().num_bytes + 4 * sum(map(math.prod, encoder))

    def save(self, tensors: Iterator[tuple[str, torch.Tensor | None]], folder: str) -> None:
        """Write what the encoder computes, as ``peft`` does, and beside it the encoder."""
        plan = self._plan()
        if self._is_plain():
            save_adapter(tensors, Path(folder), plan)
            return
        kept: dict[str, torch.Tensor] = {}

        def start(stack: ExitStack, temporary: Path) -> Write:
            peft_config(plan.fields).save_pretrained(str(temporary))
            adapter = _open(stack, temporary / ADAPTER_WEIGHTS, _entries(plan.shapes))
            encoder = _open(stack, temporary / ENCODER_WEIGHTS, _entries(self.shapes))

            def write(name: str, tensor: torch.Tensor) -> None:
                encoder.write(name, tensor)
                kept[name] = tensor
                if len(kept) == len(self.shapes):
                    adapter.write(PROMPT_EMBEDDINGS, self._computed(kept))

            return write

        stream_tensors(tensors, Path(folder), start)

    @torch.no_grad()
    def _computed(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the encoder makes of the virtual tokens, in fp32 on the CPU: [N, ...]."""
        # Built without values, so that the generators of training are left alone.
        with torch.device("meta"):
            encoder = self.make_encoder()
        encoder.to_empty(device="cpu")
        encoder.load_state_dict({n.removeprefix(f"{ENCODER}."): t for n, t in values.items()})
        computed: torch.Tensor = encoder(torch.arange(self.num_virtual_tokens)[None])
        return computed[0]

    def saved(self, folder: str) -> TensorSource:
        """What ``save`` wrote. ConfigError where its settings are not these."""
        source = adapter_source(Path(folder), self._plan())
        if self._is_plain():
            return source
        path = Path(folder) / ENCODER_WEIGHTS
        if not path.is_file():
            raise ConfigError(
                f"{folder} holds what an encoder has computed ({ADAPTER_WEIGHTS}), but not the "
                f"encoder ({ENCODER_WEIGHTS}), without which peft={self.name} cannot go on; "
                "give a folder that dtune has exported, or set peft.init_from=none"
            )
        encoder = open_files(path)
        found = {name: encoder.shape(name) for name in encoder.names()}
        if found != self.shapes:
            raise ConfigError(f"{path}: its tensors are not those of this {ADAPTER_CONFIG}")
        return encoder


def _entries(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorEntry]:
    return {name: TensorEntry(torch.float32, shape) for name, shape in shapes.items()}


def _open(stack: ExitStack, path: Path, entries: Mapping[str, TensorEntry]) -> TensorWriter:
    return stack.enter_context(TensorWriter(path, entries, metadata={"format": "pt"}))


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _uniform(fan_in: int) -> Initializer:
    bound = float(fan_in) ** -0.5

    def fill(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    return fill
