"""Weights in safetensors files, read by flat range."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from dtune.errors import ConfigError
from dtune.types import ModelSpec

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_FLOATS = ("F64", "F32", "F16", "BF16")


def files_by_tensor(folder: Path) -> dict[str, Path]:
    """Name of each stored tensor -> its file; ConfigError if files are missing or unsafe."""
    index = folder / INDEX
    if not index.is_file():
        file = folder / SINGLE
        if not file.is_file():
            raise ConfigError(
                f"model.path: {folder} has neither {SINGLE} nor {INDEX}; convert the weights to "
                "safetensors, or set model.init=random"
            )
        return dict.fromkeys(_open(file).keys(), file)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names: dict[str, str] = {str(k): str(v) for k, v in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"model.path: {index} is not an index of tensors: {error!r}") from error
    for file_name in sorted(set(names.values())):
        # The index comes with the model: it may not point outside of the model's folder.
        if Path(file_name).name != file_name:
            raise ConfigError(f"model.path: {index} names a file outside its folder: {file_name}")
        if not (folder / file_name).is_file():
            first = next(name for name, owner in names.items() if owner == file_name)
            raise ConfigError(
                f"model.path: {folder / file_name} is missing; {index.name} says it holds {first}"
            )
    return {name: folder / file_name for name, file_name in names.items()}


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"model.path: {file} is not a readable safetensors file: {error}") from (
            error
        )


def _check_layout(model: PreTrainedModel) -> None:
    transforms = get_model_conversion_mapping(model, add_legacy=False)
    unusual = [t for t in transforms if not isinstance(t, WeightRenaming)]
    if unusual:
        raise ConfigError(
            f"model.path: checkpoints of {model.config.model_type} store weights in another layout "
            f"than the model computes with ({unusual[0]}); that family is not supported"
        )


class SafetensorsSource:
    """The parameters and persistent buffers of one model in a folder of Hugging Face's layout.

    Construction checks that each is stored, in one of the names it may have, with the shape of
    the model; nothing is read before ``read``.
    """

    def __init__(
        self,
        folder: Path,
        model: PreTrainedModel,
        spec: ModelSpec,
        *,
        elsewhere: Container[str] = (),
    ) -> None:
        """Match the model's tensors with what the folder stores.

        Args:
            folder: Holds model.safetensors, or an index and its shards.
            model: Before any method changed it; on any device.
            spec: Of the model: which parameters share storage, which buffers are stored, which
                have fewer rows in the folder.
            elsewhere: Parameters that this source leaves to another.
        """
        self._files = files_by_tensor(folder)
        self._stored: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._open: dict[Path, Any] = {}
        _check_layout(model)
        prefix = f"{model.base_model_prefix}."
        for name, parameter in model.named_parameters():
            if name in elsewhere:
                continue
            aliases = [alias for alias, first in spec.tied.items() if first == name]
            shape = tuple(parameter.shape)
            if name in spec.grown:
                shape = (spec.grown[name], *shape[1:])
            self._match(name, aliases, prefix, shape, folder)
            self._check_float(name)
        for name in spec.buffers:
            self._match(name, [], prefix, tuple(model.get_buffer(name).shape), folder)
        for alias, first in spec.tied.items():
            self._stored[alias] = self._stored[first]
            self._shapes[alias] = self._shapes[first]

    def _match(
        self, name: str, aliases: list[str], prefix: str, shape: tuple[int, ...], folder: Path
    ) -> None:
        # A base model that was saved alone has no prefix.
        candidates = [name, *aliases, name.removeprefix(prefix)]
        stored = next((c for c in candidates if c in self._files), None)
        if stored is None:
            raise ConfigError(
                f"model.path: {folder} holds no tensor {name} "
                f"({len(self._files)} tensors, such as {next(iter(self._files), 'none')})"
            )
        file = self._files[stored]
        try:
            found = tuple(self._slice(stored).get_shape())
        except SafetensorError as error:
            raise ConfigError(f"model.path: {file} holds no tensor {stored}") from error
        if found != shape:
            raise ConfigError(
                f"model.path: {stored} in {file} has shape {list(found)}, the model of config.json "
                f"wants {list(shape)}"
            )
        self._stored[name] = stored
        self._shapes[name] = shape

    def _check_float(self, name: str) -> None:
        stored = self._stored[name]
        dtype = self._slice(stored).get_dtype()
        if dtype not in _FLOATS:
            raise ConfigError(
                f"model.path: {stored} in {self._files[stored]} is {dtype}, which is no float that "
                "can be read as it is; give the model before it was quantised"
            )

    def _slice(self, stored: str) -> Any:
        file = self._files[stored]
        if file not in self._open:
            self._open[file] = _open(file)
        return self._open[file].get_slice(stored)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._shapes[name]

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the row-major flattened tensor: 1-D, CPU, dtype as stored.

        Reads whole rows from disk, and no more of them than the range touches.
        """
        shape = self._shapes[name]
        piece = self._slice(self._stored[name])
        if not shape or stop <= start:
            whole: torch.Tensor = piece[:]
            return whole.flatten()[start:stop]
        row = max(1, torch.Size(shape[1:]).numel())
        first, last = start // row, -(-stop // row)
        values: torch.Tensor = piece[first:last].flatten()
        return values[start - first * row : stop - first * row]
