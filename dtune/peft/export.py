"""What others read: an adapter in PEFT's layout, a model in Hugging Face's, a tokenizer beside.

A folder appears whole or not at all. Every rank runs through the tensors, because gathering them
is collective; the first rank writes. If its disk fails it still runs through the rest, and then
raises CheckpointError on that rank alone: the caller votes.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from dtune.errors import CheckpointError, ConfigError
from dtune.resources import resolve_path
from dtune.runtime.files import published_folder
from dtune.runtime.imports import uncompiled
from dtune.runtime.tensors import FileSource, TensorEntry, TensorWriter
from dtune.types import TensorSource

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_WEIGHTS = "model.safetensors"
MODEL_INDEX = "model.safetensors.index.json"

# Size of a file of weights above which Hugging Face's tools split.
MAX_FILE_BYTES = 5_000_000_000

# Largest rank that vLLM can be set to take.
MAX_SERVED_RANK = 512

BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations after which peft saves an adapter that no longer fits the original base."""

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
    advice: Mapping[str, str] = field(default_factory=dict)
    """Decisive field -> what to turn where a file has another."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Keys of ours (``peft.init``) that change what the tensors mean, where not at their default.

    They are written into the header of the weights: peft's config has no fields for them.
    """

    @property
    def num_bytes(self) -> int:
        """Size of the weights, which are written in fp32."""
        return 4 * sum(math.prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True)
class ModelPlan:
    """A model's files: its configs, and dtype and shape of each tensor that is stored."""

    config: PretrainedConfig
    generation: GenerationConfig | None
    architecture: str
    dtype: torch.dtype
    entries: Mapping[str, TensorEntry]


def peft_config(fields: Mapping[str, object]) -> Any:
    """The config of ``peft`` with these fields, and its defaults for the others."""
    # Here, because it takes a second and only the rank that writes needs it.
    with uncompiled():
        from peft import PeftConfig
    return PeftConfig.from_peft_type(**fields)


def save_adapter(tensors: Tensors, folder: Path, plan: AdapterPlan) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, in fp32."""
    entries = {
        plan.keys[name]: TensorEntry(torch.float32, shape) for name, shape in plan.shapes.items()
    }

    def start(stack: ExitStack, temporary: Path) -> Write:
        peft_config(plan.fields).save_pretrained(str(temporary))
        path = temporary / ADAPTER_WEIGHTS
        metadata = {"format": "pt", **plan.settings}
        writer = stack.enter_context(TensorWriter(path, entries, metadata=metadata))
        return lambda name, tensor: writer.write(plan.keys[name], tensor)

    stream_tensors(tensors, folder, start)


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

    stream_tensors(tensors, folder, start)


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

    Raises ConfigError for files that are missing or cannot be read, another method, another base,
    other decisive settings, or tensors that do not fit.
    """
    path = folder / ADAPTER_WEIGHTS
    missing = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{folder} holds no adapter: {' and '.join(missing)} missing; set peft.init_from to "
            "the folder of one, saved as safetensors"
        )
    saved = read_json(folder / ADAPTER_CONFIG)
    stored = open_files(path)
    with safe_open(path, framework="pt") as file:
        settings: dict[str, str] = file.metadata() or {}
    _check_method(folder, saved, settings, plan)
    _check_base(folder, saved, plan)
    _check_tensors(path, stored, plan)
    return FileSource({name: (path, key) for name, key in plan.keys.items()})


def read_json(path: Path) -> dict[str, Any]:
    """A file of ``peft.init_from``. ConfigError where it is no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"peft.init_from: {path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"peft.init_from: {path} holds no JSON object")
    return found


def open_files(*paths: Path) -> FileSource:
    """The tensors of files of ``peft.init_from``. ConfigError where one is missing or cut short."""
    for path in paths:
        try:
            FileSource.of_files(path)
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"peft.init_from: {path} is not a whole safetensors file: {error}"
            ) from error
    return FileSource.of_files(*paths)


def _check_method(
    folder: Path, saved: Mapping[str, Any], settings: Mapping[str, str], plan: AdapterPlan
) -> None:
    kind, ours = str(saved.get("peft_type", "")), str(plan.fields["peft_type"])
    if kind != ours:
        raise ConfigError(
            f"{folder}: peft_type is {kind or 'missing'}, but the run's peft has {ours}; choose "
            "the method of the adapter with peft=..., or another peft.init_from"
        )
    start = saved.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(BASE_CHANGING):
        raise ConfigError(
            f"{folder}: init_lora_weights is {start}: this adapter belongs to a base that peft has "
            "changed; let peft convert it (save_pretrained with "
            "path_initial_model_for_weight_conversion) and set peft.init_from to the result"
        )
    keys = {key for key in settings if key.startswith("peft.")} | plan.settings.keys()
    for key in sorted(keys):
        theirs, own = settings.get(key, "default"), plan.settings.get(key, "default")
        if theirs != own:
            raise ConfigError(f"{folder} was saved with {key}={theirs}, not {own}; turn {key}")
    missing = [key for key in plan.decisive if key not in saved]
    defaults = _peft_defaults(kind) if missing else {}
    for key in plan.decisive:
        theirs, wanted = saved.get(key, defaults.get(key)), plan.fields[key]
        if theirs != wanted:
            advice = plan.advice.get(key, "choose another peft.init_from")
            raise ConfigError(
                f"{folder}: {key} is {theirs}, but the run's peft has {wanted}; {advice}"
            )


def _peft_defaults(kind: str) -> dict[str, object]:
    """What an older file means by not naming a field; nothing for a type that peft has not."""
    with uncompiled():
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        return {}
    return dict(vars(peft_config({"peft_type": kind})))


def _check_base(folder: Path, saved: Mapping[str, Any], plan: AdapterPlan) -> None:
    theirs = base_name(str(saved.get("base_model_name_or_path") or ""))
    ours = base_name(str(plan.fields.get("base_model_name_or_path") or ""))
    if theirs and ours and theirs.lower() != ours.lower():
        raise ConfigError(
            f"{folder}: the adapter belongs to {saved['base_model_name_or_path']}, and model.path "
            f"is {plan.fields['base_model_name_or_path']}; turn model.path or peft.init_from. If "
            f"they are the same model, edit base_model_name_or_path in {ADAPTER_CONFIG}"
        )


def base_name(path: str) -> str:
    """The name of a model by its path: the last component, or the Hub's name in its cache."""
    parts = [part for part in path.replace("\\", "/").split("/") if part]
    if "snapshots" in parts[1:]:
        return parts[parts.index("snapshots", 1) - 1].rpartition("--")[2]
    return parts[-1] if parts else ""


def _check_tensors(path: Path, stored: FileSource, plan: AdapterPlan) -> None:
    own, wanted = set(stored.names()), set(plan.keys.values())
    if own != wanted:
        lacking, extra = sorted(wanted - own), sorted(own - wanted)
        shown = f"{lacking[0]} is missing" if lacking else f"it holds {extra[0]}"
        raise ConfigError(
            f"{path}: peft.targets names other layers than the adapter has: {shown} "
            f"({len(lacking)} missing, {len(extra)} too many)"
        )
    for name, key in plan.keys.items():
        if stored.shape(key) != plan.shapes[name]:
            raise ConfigError(
                f"{path}: {key} has shape {list(stored.shape(key))}, this model wants "
                f"{list(plan.shapes[name])}; turn model.path or peft.init_from"
            )


CANNOT_BE_SERVED = "the saved adapter cannot be served as it is (vLLM)"


def serving_problems(fields: Mapping[str, object]) -> list[str]:
    """Why an adapter cannot be served as a LoRA beside its base, each with what to change.

    Rules of vLLM (0.6 to 0.11) and of servers that follow it; merged into its base every adapter
    can be served.
    """
    merge = "or merge it into the base for serving"
    problems = []
    if fields.get("use_dora"):
        problems.append(f"servers take no DoRA; set peft=rslora or peft=lora, {merge}")
    rank = fields.get("r", 0)
    if isinstance(rank, int) and rank > MAX_SERVED_RANK:
        problems.append(
            f"the rank of the saved adapter is {rank}, servers take {MAX_SERVED_RANK} at most; "
            f"lower peft.rank, {merge}"
        )
    if fields.get("bias", "none") != "none":
        problems.append(f"servers take no trained biases; leave them frozen, {merge}")
    if fields.get("modules_to_save"):
        problems.append(f"servers take no whole modules beside a LoRA; train none, {merge}")
    if fields.get("trainable_token_indices"):
        problems.append(
            "servers take no rows for new tokens, and no resized embedding, beside a LoRA; leave "
            f"model.added_tokens empty, set peft=full, {merge}"
        )
    if fields.get("rank_pattern") or fields.get("alpha_pattern"):
        problems.append(f"servers take one rank and alpha for all layers; set one, {merge}")
    return [f"{CANNOT_BE_SERVED}: {text}" for text in problems]


def not_a_lora(method: str, *, can_be_merged: bool) -> str:
    """Why the adapter of a method that is no LoRA cannot be served as one, and what to change."""
    way = "merge it into the base for serving (dtune merge says if it can)"
    if not can_be_merged:
        way = "serve it with the library that it loads in, since it cannot be merged"
    return f"{CANNOT_BE_SERVED}: {method} is no LoRA; set peft=lora, or {way}"


def model_source(folder: Path) -> TensorSource:
    """The tensors of a model saved in Hugging Face's layout.

    ConfigError where there is none, or a file is missing or cut short.
    """
    if (folder / MODEL_INDEX).is_file():
        files = read_json(folder / MODEL_INDEX).get("weight_map")
        if not isinstance(files, dict):
            raise ConfigError(f"peft.init_from: {folder / MODEL_INDEX} has no weight_map")
        return open_files(*(folder / name for name in sorted(set(files.values()))))
    if not (folder / MODEL_WEIGHTS).is_file():
        raise ConfigError(f"{folder} holds no model: {MODEL_WEIGHTS} is missing")
    return open_files(folder / MODEL_WEIGHTS)


def stored_path(path: str) -> str:
    """The base's path as an adapter records it: folders absolute, Hub names as they are."""
    local = Path(resolve_path(path))
    return str(local.resolve()) if local.is_dir() else path


def stream_tensors(
    tensors: Tensors, folder: Path, start: Callable[[ExitStack, Path], Write]
) -> None:
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
