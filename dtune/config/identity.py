"""What a run must have in common with a checkpoint that it goes on from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from typing import Any

import xxhash

from dtune.checkpoint.manifest import Identity, Setting
from dtune.config.run import RunConfig
from dtune.models.load import model_folder
from dtune.models.schema import Init, ModelConfig
from dtune.models.weights import files_by_tensor

# Of each file of weights: enough to tell two fine-tunes of one base apart, at no cost.
_SAMPLES = 16
_SAMPLE_BYTES = 4096
# Where the first values came from, and what is kept twice, change nothing of what follows.
_FREE = ("init_from", "cache_gib")


def identity_of(run: RunConfig, data_fingerprint: str, *, last_sequence: int) -> Identity:
    """Model, data and the settings that must not change."""
    settings: dict[str, Setting] = {
        "seed": run.seed,
        "objective.name": run.objective.name,
        "optim.name": run.optim.name,
        "precision.name": run.precision.name.value,
        "data.packing": run.data.packing,
        "data.shuffle": run.data.shuffle,
        "train.global_batch_size": run.train.global_batch_size,
    }
    if run.data.packing:
        # Which rows share a sequence follows from it, and so when each of them comes.
        settings["data.max_length"] = run.data.max_length
    if run.model.added_tokens:
        settings["model.added_tokens"] = list(run.model.added_tokens)
    defaults: dict[str, Setting] = {}
    for group, config in (("peft", run.peft), ("quant", run.quant)):
        for field in fields(config):
            if field.name in _FREE:
                continue
            key = f"{group}.{field.name}"
            settings[key] = _plain(getattr(config, field.name))
            if field.default is not MISSING:
                defaults[key] = _plain(field.default)
            elif field.default_factory is not MISSING:
                defaults[key] = _plain(field.default_factory())
    return Identity(
        model=model_identity(run.model, seed=run.seed),
        data=data_fingerprint,
        settings=settings,
        engine=run.parallel.name,
        last_sequence=last_sequence,
        defaults=defaults,
    )


def _plain(value: Any) -> Setting:
    setting: Setting = value.value if isinstance(value, Enum) else value
    return setting


def model_identity(config: ModelConfig, *, seed: int) -> str:
    """What the base is, by the contents of its files and not by where they lie.

    The weights are told by the headers, sizes and samples of their files: reading all of them
    would take as long as loading.
    """
    random = config.init is Init.random
    folder = model_folder(config, weights=not random)
    architecture = (folder / "config.json").read_bytes()
    kind = json.loads(architecture).get("model_type", "model")
    weights = f"random from seed {seed}" if random else _hash(_weight_facts(folder))
    return f"{kind}, config.json {_hash([architecture])}, weights {weights}"


def _weight_facts(folder: Path) -> Iterator[bytes]:
    for path in sorted(set(files_by_tensor(folder).values())):
        size = path.stat().st_size
        yield size.to_bytes(8, "little")
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            yield file.read(start - 8)
            for sample in range(_SAMPLES):
                file.seek(start + (size - start) * sample // _SAMPLES)
                yield file.read(_SAMPLE_BYTES)


def _hash(parts: Iterator[bytes] | list[bytes]) -> str:
    digest = xxhash.xxh3_64()
    for part in parts:
        digest.update(part)
    return str(digest.hexdigest())
