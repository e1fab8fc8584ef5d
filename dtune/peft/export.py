"""What others read: an adapter in PEFT's layout, a model in Hugging Face's, a tokenizer beside.

A folder appears whole or not at all. Every rank runs through the tensors, because gathering them
is collective; the first rank writes. If its disk fails it still runs through the rest, and then
raises CheckpointError on that rank alone: the caller votes.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from dtune.errors import CheckpointError, ConfigError
from dtune.resources import resolve_path
from dtune.runtime.files import published_folder
from dtune.runtime.tensors import FileSource, TensorEntry, TensorWriter
from dtune.types import TensorSource

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_WEIGHTS = "model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"

# Size of a file of weights above which Hugging Face's tools split.
MAX_FILE_BYTES = 5_000_000_000

Tensors = Iterator[tuple[str, torch.Tensor | None]]
Write = Callable[[str, torch.Tensor], None]


@dataclass(frozen=True)
class AdapterPlan:
    """An adapter's files: fields of its ``peft`` config, and each parameter's key and shape."""

    fields: Mapping[str, object]
    keys: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    decisive: tuple[str, ...]
    """Fields that change what the tensors mean."""


@dataclass(frozen=True)
class ModelPlan:
    """A model's files: its configs, and dtype and shape of each tensor that is stored."""

    config: PretrainedConfig
    generation: GenerationConfig | None
    architecture: str
    dtype: torch.dtype
    entries: Mapping[str, TensorEntry]


def save_adapter(tensors: Tensors, folder: Path, plan: AdapterPlan) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, in fp32."""
    entries = {
        plan.keys[name]: TensorEntry(torch.float32, shape) for name, shape in plan.shapes.items()
    }

    def start(stack: ExitStack, temporary: Path) -> Write:
        # Here, because it takes a second and only the rank that writes needs it.
        from peft import PeftConfig

        PeftConfig.from_peft_type(**plan.fields).save_pretrained(str(temporary))
        path = temporary / ADAPTER_WEIGHTS
        writer = stack.enter_context(TensorWriter(path, entries, metadata={"format": "pt"}))
        return lambda name, tensor: writer.write(plan.keys[name], tensor)

    _stream(tensors, folder, start)


def save_model(
    tensors: Tensors, folder: Path, plan: ModelPlan, *, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write configs and weights; more than one file of weights above ``max_file_bytes``."""
    files = plan_files(plan.entries, max_file_bytes)

    def start(stack: ExitStack, temporary: Path) -> Write:
        _write_model_configs(temporary, plan)
        if len(files) > 1:
            _write_index(temporary, files)
        writers: dict[str, TensorWriter] = {}
        for file, entries in files.items():
            writer = TensorWriter(temporary / file, entries, metadata={"format": "pt"})
            writers.update(dict.fromkeys(entries, stack.enter_context(writer)))
        return lambda name, tensor: writers[name].write(name, tensor)

    _stream(tensors, folder, start)


def plan_files(
    entries: Mapping[str, TensorEntry], max_file_bytes: int
) -> dict[str, dict[str, TensorEntry]]:
    """File name -> tensors in it, in order; a tensor larger than the limit has a file alone."""
    groups: list[dict[str, TensorEntry]] = [{}]
    size = 0
    for name, entry in entries.items():
        if groups[-1] and size + entry.num_bytes > max_file_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = entry
        size += entry.num_bytes
    if len(groups) == 1:
        return {MODEL_WEIGHTS: groups[0]}
    count = len(groups)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Put the tokenizer, with its chat template, beside what ``PeftMethod.save`` wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    with published_folder(folder / "tokenizer") as temporary:
        tokenizer.save_pretrained(str(temporary))
        names = sorted(path.name for path in temporary.iterdir())
    for name in names:
        os.replace(folder / "tokenizer" / name, folder / name)
    (folder / "tokenizer").rmdir()


def adapter_source(folder: Path, plan: AdapterPlan) -> TensorSource:
    """The tensors of a saved adapter under the parameters' names.

    Raises ConfigError for another method, other decisive settings, or tensors that do not fit.
    """
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file() or not (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(f"{folder} holds no adapter: {ADAPTER_CONFIG} or {path.name} is missing")
    saved = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    for key in ("peft_type", *plan.decisive):
        ours = plan.fields[key]
        if saved.get(key, ours) != ours:
            raise ConfigError(f"{folder}: {key} is {saved[key]}, but the run's peft has {ours}")
    stored = FileSource.of_files(path)
    differing = sorted(set(stored.names()) ^ set(plan.keys.values()))
    if differing:
        raise ConfigError(f"{path}: peft.targets names other layers; for example {differing[0]}")
    for name, key in plan.keys.items():
        if stored.shape(key) != plan.shapes[name]:
            raise ConfigError(
                f"{path}: {key} has shape {stored.shape(key)}, expected {plan.shapes[name]}"
            )
    return FileSource({name: (path, key) for name, key in plan.keys.items()})


def model_source(folder: Path) -> TensorSource:
    """The tensors of a model saved in Hugging Face's layout."""
    if (folder / MODEL_INDEX).is_file():
        index = json.loads((folder / MODEL_INDEX).read_text(encoding="utf-8"))
        return FileSource.of_files(
            *(folder / name for name in sorted(set(index["weight_map"].values())))
        )
    if not (folder / MODEL_WEIGHTS).is_file():
        raise ConfigError(f"{folder} holds no model: {MODEL_WEIGHTS} is missing")
    return FileSource.of_files(folder / MODEL_WEIGHTS)


def stored_path(path: str) -> str:
    """The base's path as an adapter records it: folders absolute, Hub names as they are."""
    local = Path(resolve_path(path))
    return str(local.resolve()) if local.is_dir() else path


def _stream(tensors: Tensors, folder: Path, start: Callable[[ExitStack, Path], Write]) -> None:
    """Write the tensors that arrive here into a folder that is published whole."""
    first = next(tensors, None)
    if first is None or first[1] is None:
        for _ in tensors:
            pass
        return
    try:
        with published_folder(folder) as temporary, ExitStack() as stack:
            write = start(stack, temporary)
            _write_one(write, first)
            for item in tensors:
                _write_one(write, item)
    except OSError as error:
        for _ in tensors:
            pass
        raise CheckpointError(f"{folder} cannot be written: {error}") from error


def _write_one(write: Write, item: tuple[str, torch.Tensor | None]) -> None:
    name, tensor = item
    assert tensor is not None, name
    write(name, tensor)


def _write_model_configs(folder: Path, plan: ModelPlan) -> None:
    config = copy.deepcopy(plan.config)
    config.architectures = [plan.architecture]
    config.dtype = plan.dtype
    config.save_pretrained(str(folder))
    if plan.generation is not None:
        # Not save_pretrained, which refuses a base whose sampling settings contradict each other.
        text = plan.generation.to_json_string()
        (folder / "generation_config.json").write_text(text, encoding="utf-8")


def _write_index(folder: Path, files: Mapping[str, Mapping[str, TensorEntry]]) -> None:
    total = sum(entry.num_bytes for entries in files.values() for entry in entries.values())
    weight_map = {name: file for file, entries in files.items() for name in entries}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / MODEL_INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
