"""The files of an adapter in PEFT's layout, as far as they tell without being loaded.

Imports no torch, so that a wrong path or a file cut short is answered at once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtune.errors import ConfigError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Types of peft that add something to the input or the cache and change no weight.
PROMPT_TYPES = frozenset(
    "PREFIX_TUNING PROMPT_TUNING P_TUNING MULTITASK_PROMPT_TUNING CPT CARTRIDGE".split()
)
# Types whose update of a layer's output is not linear in its input.
NETWORK_TYPES = frozenset({"BOTTLENECK"})


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's config, and the shape of each tensor of its file."""

    folder: Path
    key: str
    """Setting that names it, for errors."""
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def kind(self) -> str:
        """``peft_type``: LORA, IA3, ..."""
        return str(self.config["peft_type"])

    @property
    def base(self) -> str:
        """The base that it says it was trained on; empty where it does not say."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def is_prompt(self) -> bool:
        """Whether it changes what attention sees, and no layer."""
        return self.kind in PROMPT_TYPES

    @property
    def why_not_merged(self) -> str:
        """Why no weights are the same as the base with this; empty where some are."""
        if self.is_prompt:
            return "it adds to what attention sees and changes no weight"
        if self.kind in NETWORK_TYPES:
            return "it adds networks with a non-linearity of their own between the layers"
        return ""


def read_adapter(path: str, *, key: str) -> AdapterFiles:
    """Read the config and the header of the weights. ConfigError where the files are not whole."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{key}={path}: there is no such folder")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ConfigError(f"{key}={path} is no adapter: it has no {name}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{key}={path}: {CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ConfigError(f"{key}={path}: {CONFIG} names no peft_type")
    return AdapterFiles(folder, key, config, _read_shapes(folder / WEIGHTS, key))


def _read_shapes(path: Path, key: str) -> dict[str, tuple[int, ...]]:
    """Shapes by the header of a safetensors file, which must have the bytes that it tells of."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, size))
    if 8 + length > size:
        raise ConfigError(f"{key}: {path} is cut short within its header ({size} bytes)")
    try:
        header = json.loads(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{key}: {path} is not a safetensors file: {error!r}") from error
    if size != 8 + length + end:
        raise ConfigError(
            f"{key}: {path} has {size} bytes, its header tells of {8 + length + end}; it was cut "
            "short or damaged: copy it again"
        )
    return shapes
