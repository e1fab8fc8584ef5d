"""Settings of a command itself: split off those that it hands on to the config of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dtune.config.freeze import explain_omegaconf
from dtune.config.reference import describe_keys
from dtune.config.run import RunConfig
from dtune.config.suggest import did_you_mean, near_keys, near_options
from dtune.errors import ConfigError

T = TypeVar("T")

# Roots of settings that are no field of a run's config.
_MORE_ROOTS = ("experiment", "hydra")

ROOTS = frozenset(field.name for field in fields(RunConfig)) | frozenset(_MORE_ROOTS)
"""``unused`` of a command that takes no config of a run."""


@dataclass(frozen=True)
class Command:
    """A command with settings of its own, and what it says of itself."""

    name: str
    usage: str
    own: type
    """Dataclass of its settings, a comment above every field."""
    unused: frozenset[str]
    """Groups of a run's config that it has no use for."""
    why_unused: str
    examples: str = ""

    def help(self) -> str:
        """Usage, and every setting of its own with its meaning."""
        rows = [
            (f"{key.name}={key.default.strip('`')}", key.meaning) for key in describe_keys(self.own)
        ]
        width = max(len(setting) for setting, _ in rows)
        lines = [f"  {setting:<{width}}  {meaning}" for setting, meaning in rows]
        more = "Further settings are those of a run (dtune train --help), such as precision=bf16."
        further = [] if self.unused >= ROOTS else ["", more]
        return "\n".join([self.usage.rstrip(), "", *lines, *further, *_paragraph(self.examples)])

    def asks_help(self, argv: Sequence[str]) -> bool:
        """Whether the arguments ask for help."""
        return "--help" in argv or "-h" in argv


def _paragraph(text: str) -> list[str]:
    return ["", text.strip(), ""] if text else [""]


def split_settings(argv: Sequence[str], own: type[T], command: Command) -> tuple[T, list[str]]:
    """The command's own settings, typed and checked, and the rest for the config of the run.

    Raises ConfigError for a setting that neither knows, with the nearest names, for one that the
    command has no use for, and for one that is given twice.
    """
    values: dict[str, Any] = {}
    rest: list[str] = []
    known = [field.name for field in fields(own)]  # type: ignore[arg-type]
    for argument in argv:
        key, equals, value = argument.partition("=")
        root = key.lstrip("+").split(".")[0]
        if key in ("-m", "--multirun"):
            raise ConfigError(f"{command.name} works on one set of weights: leave {key} out")
        if key.startswith("-"):
            rest.append(argument)
        elif root in known:
            if not equals:
                raise ConfigError(f"{argument}: settings are written key=value")
            _put(values, key, value, own)
        else:
            _check_root(root, argument, known, command)
            rest.append(argument)
    return _typed(own, values), rest


def _put(values: dict[str, Any], key: str, value: str, own: type) -> None:
    """Keep a setting; of a mapping ``root.NAME=value``, one entry."""
    root, dot, name = key.partition(".")
    is_mapping = get_type_hints(own)[root] == dict[str, str]
    if is_mapping and not name:
        raise ConfigError(f"{key}={value}: give each a name of its own, {root}.NAME={value}")
    if dot and not is_mapping:
        raise ConfigError(f"unknown key {key}; did you mean {root}?")
    place = values.setdefault(root, {}) if is_mapping else values
    if (name or root) in place:
        raise ConfigError(f"{key} is given twice: {place[name or root]} and {value}")
    place[name or root] = value


def _check_root(root: str, argument: str, known: list[str], command: Command) -> None:
    roots = [field.name for field in fields(RunConfig)]
    if root in command.unused:
        raise ConfigError(f"{command.name} {command.why_unused}: leave {argument} out")
    if root not in roots and root not in _MORE_ROOTS:
        near = near_options(root, [*known, *(r for r in roots if r not in command.unused)])
        further = [key for key in near_keys(root) if key.split(".")[0] not in command.unused]
        names = list(dict.fromkeys([*near, *further]))[:3]
        raise ConfigError(f"unknown key {argument.partition('=')[0]}{did_you_mean(names)}")


def _typed(own: type[T], values: dict[str, Any]) -> T:
    hints = get_type_hints(own)
    # Text is taken as it stands: a path may look like a number or a list.
    texts = {key: value for key, value in values.items() if hints[key] in (str, dict[str, str])}
    others = [f"{key}={value}" for key, value in values.items() if key not in texts]
    try:
        merged = OmegaConf.merge(OmegaConf.structured(own), OmegaConf.from_dotlist(others))
        return _build(own, {**_plain(merged), **texts})
    except OmegaConfBaseException as error:
        raise explain_omegaconf(error) from error


def _plain(config: Any) -> dict[str, Any]:
    return {str(key): config[key] for key in config}


def _build(own: type[T], values: dict[str, Any]) -> T:
    plain = {
        key: dict(value) if get_type_hints(own)[key] == dict[str, str] else value
        for key, value in values.items()
    }
    return own(**plain)
