"""Values that have the right type and cannot be meant: not finite, or beyond what is counted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from omegaconf import DictConfig, ListConfig

from dtune.config.run import RunConfig
from dtune.errors import ConfigError

# Above it a number is not the same in JSON, which checkpoints and reports hold.
_LARGEST = 2**53


def check_values(run: RunConfig) -> None:
    """Raise ConfigError for the first number that is not finite or too large, naming its key."""
    for key, value in _leaves("", run):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value} is not a finite number")
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise ConfigError(f"{key}={value} is too large a number, above 2**53")


def _leaves(key: str, value: object) -> Iterator[tuple[str, object]]:
    parts: list[tuple[str, object]]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(f".{field.name}", getattr(value, field.name)) for field in _fields(value)]
    elif isinstance(value, dict):
        parts = [(f".{name}", inner) for name, inner in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(f"[{number}]", inner) for number, inner in enumerate(value)]
    else:
        yield key, value
        return
    for name, inner in parts:
        yield from _leaves(f"{key}{name}".removeprefix("."), inner)


def _fields(value: object) -> tuple[dataclasses.Field[object], ...]:
    assert dataclasses.is_dataclass(value)
    return dataclasses.fields(value)


def check_kinds(config: DictConfig, given: DictConfig) -> None:
    """Raise ConfigError for what OmegaConf takes as another type than the one of the key.

    A list or mapping in a list of texts, and numbers other than 0 and 1 for true and false.
    ``given`` is the config as it was written.
    """
    waiting: list[tuple[str, DictConfig, DictConfig]] = [("", config, given)]
    while waiting:
        prefix, node, raw = waiting.pop()
        for name in raw:
            key = prefix + str(name)
            inner, written = node[name], raw[name]
            if isinstance(inner, DictConfig) and isinstance(written, DictConfig):
                waiting.append((f"{key}.", inner, written))
            elif isinstance(inner, ListConfig) and isinstance(inner._metadata.element_type, type):
                _check_texts(key, inner)
            elif isinstance(inner, bool) and not isinstance(written, bool):
                check_truth(key, repr(written))


def _check_texts(key: str, values: ListConfig) -> None:
    for value in values:
        if isinstance(value, DictConfig | ListConfig):
            raise ConfigError(f"{key} is a list of texts and holds {value!r}")


def check_truth(key: str, written: str) -> None:
    """Raise ConfigError for a number that is neither 0 nor 1."""
    try:
        wrong = int(written) not in (0, 1)
    except ValueError:
        return
    if wrong:
        raise ConfigError(f"{key}={written} is neither true nor false")
