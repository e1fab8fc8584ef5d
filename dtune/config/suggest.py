"""Nearest right names for a wrong key or option."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from functools import cache
from typing import get_type_hints

from dtune.config.run import POLYMORPHIC, RunConfig

# What users of other frameworks type from habit. Only ever suggested, never accepted.
SYNONYMS = {
    "lora_r": "peft.rank",
    "lora_alpha": "peft.alpha",
    "lora_dropout": "peft.dropout",
    "lora_rank": "peft.rank",
    "target_modules": "peft.targets",
    "lora_target_modules": "peft.targets",
    "learning_rate": "optim.lr",
    "lr": "optim.lr",
    "weight_decay": "optim.weight_decay",
    "warmup_steps": "schedule.warmup_steps",
    "lr_scheduler_type": "schedule",
    "per_device_train_batch_size": "train.micro_batch_size",
    "per_device_batch_size": "train.micro_batch_size",
    "micro_batch_size": "train.micro_batch_size",
    "batch_size": "train.global_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "max_steps": "train.max_steps",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "epochs": "train.epochs",
    "max_grad_norm": "train.max_norm",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "packing": "data.packing",
    "sample_packing": "data.packing",
    "gradient_checkpointing": "train.recompute",
    "attn_implementation": "model.attention",
    "model_name_or_path": "model.path",
    "base_model": "model.path",
    "dataset": "data.path",
    "bf16": "precision=bf16",
    "fp16": "precision=fp16",
    "output_dir": "run_dir",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "eval_steps": "train.eval_every",
    "resume_from_checkpoint": "resume",
    "nproc_per_node": "launch.nproc",
    "num_gpus": "launch.nproc",
    "deepspeed": "parallel=zero3",
    "load_in_4bit": "quant",
}


def _keys(config: type, prefix: str, *, of: type | None = None) -> Iterable[str]:
    """Dotted keys, those of one type alone where ``of`` names it."""
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        key = f"{prefix}{field.name}"
        if prefix == "" and field.name in POLYMORPHIC:
            registry = POLYMORPHIC[field.name]
            for name in registry.names():
                yield from _keys(registry.config(name), f"{key}.", of=of)
        elif dataclasses.is_dataclass(hints[field.name]):
            yield from _keys(hints[field.name], f"{key}.", of=of)
        elif field.name != "name" and of in (None, hints[field.name]):
            yield key


@cache
def all_keys() -> tuple[str, ...]:
    """Every key that some config has, dotted, without duplicates."""
    return tuple(dict.fromkeys(_keys(RunConfig, "")))


@cache
def truth_keys() -> frozenset[str]:
    """Keys that are true or false."""
    return frozenset(_keys(RunConfig, "", of=bool))


def near_keys(key: str) -> list[str]:
    """The right keys that a wrong one probably means, best first, at most three."""
    leaf = key.rsplit(".", 1)[-1]
    found = [SYNONYMS[leaf]] if leaf in SYNONYMS else []
    found += difflib.get_close_matches(key, all_keys(), n=3, cutoff=0.7)
    leaves: dict[str, list[str]] = {}
    for full in all_keys():
        leaves.setdefault(full.rsplit(".", 1)[-1], []).append(full)
    for near in difflib.get_close_matches(leaf, leaves, n=2, cutoff=0.75):
        found += leaves[near]
    return list(dict.fromkeys(found))[:3]


def unknown_key(key: str, near: Iterable[str] = ()) -> str:
    """What to say of a key that the config has not: whose it is, or which was meant.

    ``near``: names to suggest before those of keys.
    """
    group, registry = key.split(".")[0], POLYMORPHIC.get(key.split(".")[0])
    if registry is None or key not in all_keys():
        return f"unknown key {key}{did_you_mean([*near, *near_keys(key)])}"
    names = [n for n in registry.names() if key in _keys(registry.config(n), f"{group}.")]
    return f"unknown key {key}: it is one of {group}={', '.join(names)}, and another is chosen"


def near_options(wrong: str, options: Iterable[str]) -> list[str]:
    """The options that a wrong one probably means, best first, at most three."""
    return difflib.get_close_matches(wrong, list(options), n=3, cutoff=0.5)


def did_you_mean(names: list[str]) -> str:
    """A sentence for an error message; empty without names."""
    return f"; did you mean {' or '.join(names)}?" if names else ""
