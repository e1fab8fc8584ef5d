"""Any other method of the installed HF ``peft``: ``peft.type`` with the fields of its config."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from dtune.errors import ConfigError
from dtune.peft.schema.hf import READS_WEIGHT, TYPES, HfConfig
from dtune.peft.tuners import NEUTRAL, Tuner

OURS = {
    "bias": "biases are not trained; see peft=bitfit",
    "exclude_modules": "set peft.targets",
    "fan_in_fan_out": "follows from the model",
    "layers_pattern": "set peft.targets",
    "layers_to_transform": "set peft.targets",
    "modules_to_save": "see peft=freeze",
    "peft_type": "set peft.type",
    "runtime_config": "is not for training",
    "target_modules": "set peft.targets",
    "target_parameters": "set peft.targets",
}
"""Fields that are not options, and what is there instead."""


class Hf(Tuner):
    """What ``peft.type`` names, around the targets; all else is frozen."""

    def __init__(self, config: HfConfig) -> None:
        super().__init__(config.targets)
        self.config = config
        self.key = f"peft.type={config.type}"
        self.reads_weight = config.type in READS_WEIGHT
        self.starts_at_base = config.type not in STARTS_ELSEWHERE
        self._class = config_class(config.type)
        check_options(config.type, self._class, config.options)

    def peft_config(self, targets: list[str]) -> peft.PeftConfig:
        """Settings as ``peft`` takes them."""
        return self._class(target_modules=targets, **self.config.options)


STARTS_ELSEWHERE = frozenset({"C3A", "FOURIERFT"})
"""Types whose first values, unless an option says otherwise, change the model."""


def config_class(name: str) -> type[peft.PeftConfig]:
    """The config of a type. ConfigError where the installed ``peft`` has none."""
    known: dict[str, type[peft.PeftConfig]] = {
        kind.value: made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    if name not in known:
        there = ", ".join(kind for kind in TYPES if kind in known)
        raise ConfigError(f"peft.type={name}: HF peft {peft.__version__} does not have it; {there}")
    return known[name]


def check_options(name: str, config: type[peft.PeftConfig], options: Mapping[str, Any]) -> None:
    """ConfigError for an option that the config does not have, or of another type."""
    hints = get_type_hints(config)
    known = {f.name for f in fields(config) if f.init} - NEUTRAL - set(OURS)
    known |= {"d_initial"} & set(hints)
    for key, value in options.items():
        if key in OURS or key in NEUTRAL - known:
            raise ConfigError(f"peft.options.{key} is not an option: {OURS.get(key, 'it is ours')}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ConfigError(
                f"peft.options.{key} is no option of {name}; {hint}"
                f"Options: {', '.join(sorted(known))}"
            )
        if not fits(value, hints[key]):
            wanted = hints[key].__name__ if isinstance(hints[key], type) else str(hints[key])
            wanted = wanted.replace("typing.", "")
            raise ConfigError(f"peft.options.{key}={value!r} is no {wanted}, which {name} takes")


def fits(value: object, hint: Any) -> bool:
    """Whether a value of YAML may stand for an annotation; an int stands for a float."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if origin in (list, set, tuple):
        inner = args[0] if args else Any
        return isinstance(value, list) and all(fits(item, inner) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True
