"""The only user of Hydra: from a command line to one resolved config text, without torch."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.conf import HydraConf
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from dtune.config.freeze import explain_omegaconf, freeze
from dtune.config.run import POLYMORPHIC, RunConfig
from dtune.config.suggest import did_you_mean, near_keys, near_options, truth_keys, unknown_key
from dtune.config.values import check_truth
from dtune.errors import ConfigError
from dtune.resources import find_data

# Long options of Hydra itself; everything else is written key=value.
HYDRA_FLAGS = frozenset(
    "--help --hydra-help --version --cfg --resolve --package --run --multirun --shell-completion "
    "--config-path --config-name --config-dir --experimental-rerun --info".split()
)

# Of these it takes one: each says what is done with what is composed.
_MODES = {"-r": "--run", "-m": "--multirun", "-c": "--cfg", "-i": "--info"}
_MODES |= {"-sc": "--shell-completion"}

# Keys whose own keys are not ours to name.
OPEN_KEYS = ("peft.options", "data.columns", "bench.rates")


@dataclass(frozen=True)
class Composed:
    """One of the configs that a command line comes to; a sweep comes to several."""

    text: str
    """The frozen config of the run."""
    own: Any
    """The command's own section, typed."""
    overrides: tuple[str, ...]
    """The settings of this one."""
    choices: Mapping[str, str]
    """Option of every group."""


def register_schemas(root: type[RunConfig] = RunConfig) -> None:
    """Store every typed config under ``<group>/schema/<name>``, and the run's as ``schema/run``.

    ``root`` is the run's, or that of a command which adds a section of its own to it.
    """
    store = ConfigStore.instance()
    store.store(group="schema", name="run", node=root, package="_global_")
    for group, registry in POLYMORPHIC.items():
        for name in registry.names():
            store.store(group=f"{group}/schema", name=name, node=registry.config(name))


def compose(config_name: str, argv: Sequence[str]) -> str | None:
    """Run Hydra on the arguments of a command; the frozen text of the config, resolved.

    Hydra keeps all of its own: overrides, ``-m`` and sweepers, ``--cfg job``, ``--info``, shell
    completion, ``hydra.searchpath``. Returns None where Hydra did what was asked (a sweep,
    ``--cfg``, ...) and nothing is left to run. Raises ConfigError with the nearest right names.
    """
    if "--help" in argv or "-h" in argv:
        sys.stdout.write(help_text())
        return None
    register_schemas()
    composed: list[DictConfig] = []
    _run_hydra(config_name, argv, composed.append)
    return freeze(composed[0]) if composed else None


def compose_each(
    config_name: str, argv: Sequence[str], *, root: type[RunConfig], section: str
) -> list[Composed]:
    """Like `compose`, for a command that runs what a sweep comes to by itself.

    ``root`` is the run's config with the command's own ``section``, which is no part of the frozen
    text. The config file must choose Hydra's basic launcher. Nothing where nothing is left to run.
    """
    register_schemas(root)
    found: list[tuple[DictConfig, HydraConf]] = []

    def keep(config: DictConfig) -> None:
        found.append((config, HydraConfig.get()))

    _run_hydra(config_name, argv, keep)
    return [_take_section(config, hydra_config, section) for config, hydra_config in found]


def _take_section(config: DictConfig, hydra_config: HydraConf, section: str) -> Composed:
    """Part a command's own section from the config of the run."""
    try:
        OmegaConf.resolve(config)
        own = OmegaConf.to_object(config[section])
    except OmegaConfBaseException as error:
        raise explain_omegaconf(error) from error
    with open_dict(config):
        del config[section]
    choices = {str(group): str(option) for group, option in hydra_config.runtime.choices.items()}
    return Composed(freeze(config), own, tuple(map(str, hydra_config.overrides.task)), choices)


def _run_hydra(config_name: str, argv: Sequence[str], task: Callable[[DictConfig], None]) -> None:
    """Have Hydra call ``task`` with what arguments come to; ConfigError where they are wrong."""
    check_flags(argv)
    check_truths(argv)
    # An absolute folder: the same for a wheel, an editable install and any working directory.
    folder = str(find_data("conf", f"{config_name}.yaml"))
    app = hydra.main(config_path=folder, config_name=config_name, version_base="1.3")(task)
    with _arguments([sys.argv[0], *_both_spellings(argv)]), _full_errors(), _explained(argv):
        app()


def compose_overrides(config_name: str, overrides: Sequence[str]) -> str:
    """Compose without a command line: the frozen text for the overrides."""
    register_schemas()
    folder = str(find_data("conf", f"{config_name}.yaml"))
    with _explained(overrides), hydra.initialize_config_dir(folder, version_base="1.3"):
        return freeze(hydra.compose(config_name, list(_both_spellings(overrides))))


def help_text() -> str:
    """Groups and their options, and how settings are written."""
    folders = sorted(path for path in find_data("conf", "train.yaml").iterdir() if path.is_dir())
    groups = [
        f"  {folder.name:<12} {', '.join(sorted(path.stem for path in folder.glob('*.yaml')))}"
        for folder in folders
    ]
    return "\n".join(
        [
            "Settings are written group=option and key=value, for example:",
            "  dtune train experiment=quickstart",
            "  dtune train model.path=/models/llama data=messages data.path=my.jsonl parallel=fsdp",
            "  dtune train -m peft=lora,full optim.lr=1e-3,3e-3",
            "",
            "Groups and their options:",
            *groups,
            "",
            "Keys with their values: dtune config [settings]; with their meaning: docs/config.md.",
            "Hydra's own flags (--cfg, --info, --config-dir, ...): --hydra-help.",
            "",
        ]
    )


def check_flags(argv: Sequence[str]) -> None:
    """Refuse ``--key value``: settings are written ``key=value``, flags are Hydra's own."""
    for argument in argv:
        flag = argument.split("=", 1)[0]
        if not flag.startswith("--") or flag in HYDRA_FLAGS:
            continue
        near = near_options(flag, HYDRA_FLAGS) or near_keys(flag[2:].replace("-", "_"))
        raise ConfigError(
            f"unknown option {flag}: settings are written key=value{did_you_mean(near)}"
        )
    flags = [argument.split("=", 1)[0] for argument in argv]
    modes = dict.fromkeys(_MODES.get(flag, flag) for flag in flags)
    together = [flag for flag in modes if flag in _MODES.values()]
    if len(together) > 1:
        raise ConfigError(f"{' and '.join(together)} exclude each other: leave one of them out")


def check_truths(argv: Sequence[str]) -> None:
    """Refuse numbers other than 0 and 1 for what is true or false: OmegaConf takes any for true."""
    for argument in argv:
        key, _, value = argument.partition("=")
        if key.lstrip("+") in truth_keys():
            check_truth(key.lstrip("+"), value)


def _both_spellings(argv: Sequence[str]) -> Iterator[str]:
    # Hydra takes experiment=x or +experiment=x, depending on the defaults list; users type either.
    # It takes keys that no schema names only with ++ before them.
    for argument in argv:
        if argument.startswith(tuple(f"{key}{sign}" for key in OPEN_KEYS for sign in ".=")):
            yield f"++{argument}"
        else:
            yield argument[1:] if argument.startswith("+experiment=") else argument


@contextmanager
def _arguments(argv: list[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = argv
    try:
        yield
    finally:
        sys.argv = before


@contextmanager
def _full_errors() -> Iterator[None]:
    # With this variable Hydra raises its errors instead of printing them and exiting with 1.
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


@contextmanager
def _explained(argv: Sequence[str]) -> Iterator[None]:
    """Turn what Hydra, OmegaConf and YAML raise for a wrong setting or file into a ConfigError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"a file of the config cannot be read: {error}") from error
    except ValueError as error:
        if not str(error).startswith("Config group override must be"):
            raise
        groups = [argument for argument in argv if is_of_group(argument)]
        raise ConfigError(f"{' or '.join(groups)}: a group takes the name of an option") from error


def is_of_group(argument: str) -> bool:
    """Whether a setting is of a whole group, or of nothing."""
    key = argument.split("=", 1)[0].lstrip("+~")
    return not key or (find_data("conf", "train.yaml") / key).is_dir()


def explain(error: HydraException | OmegaConfBaseException) -> ConfigError:
    """Say a Hydra or OmegaConf error in dtune's words, with the nearest right names."""
    if isinstance(error, OmegaConfBaseException):
        return explain_omegaconf(error)
    text = str(error).strip()
    if isinstance(error, OverrideParseException):
        reason = text.splitlines()[0].removeprefix("LexerNoViableAltException: ")
        given = error.override
        why = "it is neither key=value nor group=option" if given == reason else reason
        return ConfigError(f"{given}: {why}; quote what is not plain, as in 'key=\"a: b\"'")
    if isinstance(error, MissingConfigException):
        return _explain_option(text)
    if isinstance(error, ConfigCompositionException):
        wrong = re.search(r"Could not (?:override|append to config[^']*) '([^']+)'", text)
        cause = error.__cause__
        if wrong and isinstance(cause, ConfigAttributeError | ConfigKeyError):
            key = wrong.group(1)
            return ConfigError(unknown_key(key, _near_groups(key)))
        if isinstance(cause, OmegaConfBaseException):
            return explain_omegaconf(cause)
    return ConfigError(text)


def _explain_option(text: str) -> ConfigError:
    """``Could not find 'peft/lorra'`` and its list of options, with the nearest ones."""
    wrong = re.search(r"Could not (?:find|load) '([\w/-]+)/([^'/]+)'", text)
    if wrong is None:
        return ConfigError(text)
    group, option = wrong.groups()
    folder = find_data("conf", "train.yaml") / group
    options = sorted(path.stem for path in Path(folder).glob("*.yaml"))
    near = did_you_mean([f"{group}={name}" for name in near_options(option, options)])
    return ConfigError(
        f"{group}={option} does not exist{near}; {group} is one of {', '.join(options)}"
    )


def _near_groups(wrong: str) -> list[str]:
    if "." in wrong:
        return []
    groups = [path.name for path in find_data("conf", "train.yaml").iterdir() if path.is_dir()]
    return [f"{name}=..." for name in near_options(wrong, sorted(groups))]
