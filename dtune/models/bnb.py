"""Checkpoints whose linears bitsandbytes has quantised: their bytes, without quantising again.

Shape legend: O x I a linear's weight, N = O * I its elements, B = ceil(N / block) blocks and their
scales, G = ceil(B / 256) groups of scales.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from dtune_kernels.fourbit import BLOCK_SIZES, FourBitWeight
from dtune_kernels.fourbit.tables import GROUP, codebook, scale_codebook
from dtune_kernels.int8.weight import Int8Weight
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from dtune.errors import ConfigError
from dtune.models.weights import SafetensorsSource, files_by_tensor
from dtune.runtime.tensors import FileSource
from dtune.types import ModelSpec, StoredQuant

USUAL_BLOCK = 64
"""Elements that share a scale, unless the files say otherwise: config.json does not."""

_CPU = torch.device("cpu")
_STATE = ".weight.quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
# Versions of bitsandbytes, and devices, sum the 8-bit codebook to within the last bits of fp32.
_CODE_TOLERANCE = 4 * torch.finfo(torch.float32).eps


def quantized_by_config(
    raw: Mapping[str, Any], model: PreTrainedModel, linears: Mapping[str, object], *, path: str
) -> StoredQuant:
    """What ``quantization_config`` of a config.json says about the linears of a model.

    ConfigError for another quantiser than bitsandbytes. Its files are asked by ``BnbSource``.
    """
    four, eight = (bool(raw.get(f"load_in_{bits}bit")) for bits in (4, 8))
    if raw.get("quant_method", "bitsandbytes") != "bitsandbytes" or four == eight:
        method = raw.get("quant_method", "a quantiser that config.json does not name")
        raise ConfigError(
            f"model.path={path}: the checkpoint is quantised by {method}; dtune reads those that "
            "bitsandbytes has quantised to 4 or 8 bits. Give the original model and set quant"
        )
    skipped = raw.get("llm_int8_skip_modules")
    patterns = get_keys_to_not_convert(model) if skipped is None else list(skipped)
    chosen = frozenset(name for name in linears if should_convert_module(name, patterns))
    if eight:
        return StoredQuant(_int8_settings(), chosen)
    double = bool(raw.get("bnb_4bit_use_double_quant", False))
    kind = str(raw.get("bnb_4bit_quant_type", "fp4"))
    return StoredQuant(_fourbit_settings(kind, double, USUAL_BLOCK), chosen)


def _fourbit_settings(kind: str, double: bool, block_size: int) -> dict[str, str | int | bool]:
    return {"name": kind, "double": double, "block_size": block_size}


def _int8_settings() -> dict[str, str | int | bool]:
    return {"name": "int8"}


@dataclass(frozen=True)
class _Kept:
    """One quantised linear of the files."""

    shape: tuple[int, int]
    settings: Mapping[str, str | int | bool]
    keys: Mapping[str, str]
    """codes, absmax, absmax2 -> key in the files."""
    offset: torch.Tensor | None
    """[1], fp32; None without second scales."""


class BnbSource:
    """The weights of one model in a folder that bitsandbytes and transformers have written.

    Linears that are floats in the files, and all other tensors, come as they are stored. Of each
    quantised linear ``X`` come the bytes, flat uint8: ``X.codes`` (4 bits: [ceil(N / 2)], the first
    element in the high half; 8 bits: [N], int8), ``X.absmax`` (fp32 [B] or [O]; with second scales
    8-bit codes [B]), ``X.absmax2`` (fp32 [G]) and ``X.offset`` (fp32 [1]); and, made from them, the
    float ``X.weight``, fp32.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, spec: ModelSpec) -> None:
        """Match the model with what the folder stores; reads tables and scalars, no weights.

        Raises:
            ConfigError: A tensor is missing, or is not what bitsandbytes' codes mean.
        """
        self._folder = folder
        files = files_by_tensor(folder)
        self._files = FileSource({name: (path, name) for name, path in files.items()})
        prefix = f"{model.base_model_prefix}."
        self._kept: dict[str, _Kept] = {}
        for path in spec.linears:
            linear = model.get_submodule(path)
            assert isinstance(linear, nn.Linear), path
            stored = next((p for p in (path, path.removeprefix(prefix)) if self._is_kept(p)), None)
            if stored is None:
                continue
            if f"{path}.weight" in spec.grown:
                self._refuse(f"model.added_tokens needs new rows of {path}, which is quantised")
            self._kept[path] = self._keep(stored, (linear.out_features, linear.in_features))
        if not self._kept:
            self._refuse("config.json says bitsandbytes, but no linear is quantised")
        weights = {f"{path}.weight" for path in self._kept}
        self._floats = SafetensorsSource(folder, model, spec, elsewhere=weights)
        self._bytes = {
            f"{path}.{part}": (path, part)
            for path, kept in self._kept.items()
            for part in [*kept.keys, *(["offset"] if kept.offset is not None else [])]
        }
        self._weights = {f"{path}.weight": path for path in self._kept}

    @property
    def quantized(self) -> StoredQuant:
        """How the files keep what is quantised; ConfigError where linears differ in it."""
        first, *others = self._kept.items()
        for path, kept in others:
            if kept.settings != first[1].settings:
                self._refuse(
                    f"{first[0]} is kept as {_shown(first[1].settings)} and {path} as "
                    f"{_shown(kept.settings)}; one kind for all linears is supported"
                )
        return StoredQuant(first[1].settings, frozenset(self._kept))

    def __contains__(self, name: str) -> bool:
        return name in self._bytes or name in self._weights or name in self._floats

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        if name in self._bytes:
            return (self._num_bytes(*self._bytes[name]),)
        if name in self._weights:
            return self._kept[self._weights[name]].shape
        return self._floats.shape(name)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the row-major flattened tensor: 1-D, CPU."""
        if name in self._bytes:
            return self._read_bytes(*self._bytes[name], start, stop)
        if name in self._weights:
            return self._dequantize(self._weights[name], start, stop)
        return self._floats.read(name, start, stop)

    def _is_kept(self, path: str) -> bool:
        return f"{path}.SCB" in self._files or self._kind_of(path) != ""

    def _kind_of(self, path: str) -> str:
        return next((kind for kind in _KINDS if f"{path}{_STATE}{kind}" in self._files), "")

    def _keep(self, path: str, shape: tuple[int, int]) -> _Kept:
        kind = self._kind_of(path)
        return self._keep_4bit(path, kind, shape) if kind else self._keep_8bit(path, shape)

    def _keep_4bit(self, path: str, kind: str, shape: tuple[int, int]) -> _Kept:
        state = self._state_of(f"{path}{_STATE}{kind}")
        weight = f"{path}.weight"
        numel, block = shape[0] * shape[1], int(state["blocksize"])
        if tuple(state["shape"]) != shape:
            self._refuse(
                f"{weight} has shape {list(state['shape'])}, the model of config.json wants "
                f"{list(shape)}"
            )
        if block not in BLOCK_SIZES:
            self._refuse(f"{weight} has blocks of {block} elements; supported are {BLOCK_SIZES}")
        keys = {"codes": weight, "absmax": f"{weight}.absmax"}
        blocks, double = -(-numel // block), f"{weight}.nested_absmax" in self._files
        sizes = {"codes": (numel + 1) // 2, "absmax": blocks if double else 4 * blocks}
        self._check_codes(f"{weight}.quant_map", codebook(kind, False, _CPU).values)
        offset = None
        if double:
            if int(state["nested_blocksize"]) != GROUP:
                self._refuse(f"{weight} groups {state['nested_blocksize']} scales, not {GROUP}")
            self._check_codes(f"{weight}.nested_quant_map", scale_codebook(_CPU).values)
            keys["absmax2"], sizes["absmax2"] = f"{weight}.nested_absmax", 4 * -(-blocks // GROUP)
            offset = torch.tensor([float(state["nested_offset"])], dtype=torch.float32)
        kept = _Kept(shape, _fourbit_settings(kind, double, block), keys, offset)
        self._check_sizes(kept, sizes)
        return kept

    def _keep_8bit(self, path: str, shape: tuple[int, int]) -> _Kept:
        layout = f"{path}.weight_format"
        if layout in self._files and int(self._files.read(layout, 0, 1)) != 0:
            self._refuse(f"{layout}: the codes are laid out for one GPU, not row by row")
        keys = {"codes": f"{path}.weight", "absmax": f"{path}.SCB"}
        kept = _Kept(shape, _int8_settings(), keys, None)
        self._check_sizes(kept, {"codes": shape[0] * shape[1], "absmax": 4 * shape[0]})
        return kept

    def _state_of(self, key: str) -> dict[str, Any]:
        size = self._files.shape(key)[0]
        raw = bytes(self._files.read(key, 0, size).tolist())
        try:
            state: dict[str, Any] = json.loads(raw)
        except ValueError:
            self._refuse(f"{key} holds no JSON")
        return state

    def _check_codes(self, key: str, wanted: torch.Tensor) -> None:
        found = self._files.read(key, 0, self._files.shape(key)[0]).float()
        if found.shape != wanted.shape or not torch.allclose(
            found, wanted, rtol=_CODE_TOLERANCE, atol=0.0
        ):
            self._refuse(f"{key} is not the table of bitsandbytes: its codes mean other numbers")

    def _check_sizes(self, kept: _Kept, sizes: Mapping[str, int]) -> None:
        for part, wanted in sizes.items():
            key = kept.keys[part]
            if key not in self._files:
                self._refuse(f"no tensor {key}")
            found = torch.Size(self._files.shape(key)).numel() * self._itemsize(key)
            if found != wanted:
                self._refuse(f"{key} has {found} bytes, the model of config.json wants {wanted}")

    def _itemsize(self, key: str) -> int:
        return self._files.read(key, 0, 1).dtype.itemsize

    def _num_bytes(self, path: str, part: str) -> int:
        if part == "offset":
            return 4
        key = self._kept[path].keys[part]
        return torch.Size(self._files.shape(key)).numel() * self._itemsize(key)

    def _read_bytes(self, path: str, part: str, start: int, stop: int) -> torch.Tensor:
        """Bytes [start, stop) of a tensor, whatever its elements are."""
        kept = self._kept[path]
        if part == "offset":
            assert kept.offset is not None, path
            return kept.offset.view(torch.uint8)[start:stop]
        key = kept.keys[part]
        size = self._itemsize(key)
        first = start // size
        values = self._files.read(key, first, -(-stop // size)).contiguous()
        return values.view(torch.uint8)[start - first * size : stop - first * size]

    def _dequantize(self, path: str, start: int, stop: int) -> torch.Tensor:
        """Elements of the weight, fp32; no more is read than the blocks or rows around them."""
        kept = self._kept[path]
        if stop <= start:
            return torch.empty(0)
        if kept.settings["name"] == "int8":
            columns = kept.shape[1]
            first, last = start // columns, -(-stop // columns)
            codes = self._read_bytes(path, "codes", first * columns, last * columns)
            absmax = self._read_bytes(path, "absmax", 4 * first, 4 * last).clone()
            shape = (last - first, columns)
            rows = Int8Weight(shape, codes.view(torch.int8).view(shape), absmax.view(torch.float32))
            flat = rows.dequantize(torch.float32).view(-1)
            return flat[start - first * columns : stop - first * columns]
        blocks = self._blocks(path, start, stop)
        begin = start // blocks.block_size * blocks.block_size
        return blocks.dequantize(torch.float32).view(-1)[start - begin : stop - begin]

    def _blocks(self, path: str, start: int, stop: int) -> FourBitWeight:
        """The blocks that elements [start, stop) lie in, as a weight of one row."""
        kept = self._kept[path]
        size = int(kept.settings["block_size"])
        first, last = start // size, -(-stop // size)
        end = min(last * size, kept.shape[0] * kept.shape[1])
        codes = self._read_bytes(path, "codes", first * size // 2, (end + 1) // 2)
        kind, shape = str(kept.settings["name"]), (1, end - first * size)
        if kept.offset is None:
            absmax = self._read_bytes(path, "absmax", 4 * first, 4 * last).clone()
            return FourBitWeight(shape, kind, size, codes, absmax.view(torch.float32))
        group, groups = first // GROUP, -(-last // GROUP)
        absmax2 = self._read_bytes(path, "absmax2", 4 * group, 4 * groups).clone()
        return FourBitWeight(
            shape,
            kind,
            size,
            codes,
            self._read_bytes(path, "absmax", first, last),
            absmax2.view(torch.float32),
            kept.offset,
            first - group * GROUP,
        )

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigError(f"model.path: {self._folder} cannot be read as quantised: {what}")


def _shown(settings: Mapping[str, object]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())
