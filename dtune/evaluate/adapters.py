"""Several named adapters on one base, one at a time, by HF ``peft``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import peft
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from dtune.errors import ConfigError
from dtune.evaluate.adapter_files import AdapterFiles

NONE = "none"
"""Name of the base without any adapter."""

_PREFIX = "base_model.model."
# What follows the path of the layer that a tensor belongs to: ``lora_A.weight``, ``ia3_l``.
_MOST_PARTS = 2


def check_fits(files: AdapterFiles, base: nn.Module) -> None:
    """Raise ConfigError where the adapter's tensors are of layers that the base does not have.

    ``base`` may be on the meta device. LoRA's shapes are compared as well; those of other methods
    when they are loaded.
    """
    if files.kind not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ConfigError(
            f"{files.key}={files.folder}: peft knows no adapter of type {files.kind}; dtune uses "
            "it with run_dir=, the folder of the run that trained it"
        )
    if files.is_prompt:
        return
    modules = dict(base.named_modules())
    for key, shape in files.shapes.items():
        name = key.removeprefix(_PREFIX)
        if name == key:
            continue  # Shared by all layers, as VeRA's projections are.
        parts = name.split(".")
        depth = next(
            n for n in range(len(parts), -1, -1) if n == 0 or ".".join(parts[:n]) in modules
        )
        owner = modules[".".join(parts[:depth])]
        if len(parts) - depth > _MOST_PARTS or isinstance(owner, nn.ModuleList) or depth == 0:
            raise ConfigError(
                f"{files.key}={files.folder}: the base has no layer {'.'.join(parts[: depth + 1])} "
                f"for {key}; it was trained on {files.base or 'another base'}"
            )
        _check_lora_shape(files, key, shape, owner)


def _check_lora_shape(
    files: AdapterFiles, key: str, shape: tuple[int, ...], owner: nn.Module
) -> None:
    if not isinstance(owner, nn.Linear):
        return
    sides = {"lora_A.weight": (1, owner.in_features), "lora_B.weight": (0, owner.out_features)}
    for ending, (dim, size) in sides.items():
        if key.endswith(ending) and shape[dim] != size:
            raise ConfigError(
                f"{files.key}={files.folder}: {key} has shape {list(shape)}, but the base's layer "
                f"has {size} features there; it was trained on {files.base or 'another base'}"
            )


def load_adapter(base: PreTrainedModel, files: AdapterFiles) -> Any:
    """A ``PeftModel`` around the base, whose layers are wrapped in place.

    ConfigError where the tensors do not fit, or are not all that the adapter's config asks for.
    """
    try:
        with warnings.catch_warnings():
            # peft asks for what transformers calls deprecated.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            model = peft.PeftModel.from_pretrained(base, str(files.folder))
    except (RuntimeError, ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(
            f"{files.key}={files.folder} cannot be put on this base: {reason}"
        ) from error
    if not files.is_prompt:
        wanted = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
        # peft saves a layer of the embeddings whole, beside its update.
        found = {key for key in files.shapes if key in wanted or ".base_layer." not in key}
        differing = sorted(wanted ^ found)
        if differing:
            raise ConfigError(
                f"{files.key}={files.folder}: its config and its weights name different layers; "
                f"for example {differing[0]}"
            )
    return model.eval()


class NamedAdapters:
    """A base and adapters for it, of any methods and ranks; one is on it at a time."""

    def __init__(self, base: PreTrainedModel, files: Mapping[str, AdapterFiles]) -> None:
        self._base = base
        self._files = dict(files)
        self._wrapped: Any = None
        self.active = NONE

    @property
    def names(self) -> tuple[str, ...]:
        """What ``use`` takes: each adapter, and the base alone."""
        return (*self._files, NONE)

    def use(self, name: str) -> nn.Module:
        """Put an adapter in the place of the one before; what generates with it."""
        assert name in self.names, name
        if name != self.active:
            if self._wrapped is not None and not self._files[self.active].is_prompt:
                self._wrapped.unload()
            self._wrapped = None
            if name != NONE:
                self._wrapped = load_adapter(self._base, self._files[name])
            self.active = name
        if name != NONE and self._files[name].is_prompt:
            wrapped: nn.Module = self._wrapped
            return wrapped
        return self._base
