"""The frozen config: resolved YAML text, and its strict way back into the typed tree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from dtune.config.run import POLYMORPHIC, RunConfig
from dtune.config.secret import check_settings
from dtune.config.suggest import did_you_mean, near_options, unknown_key
from dtune.config.text import check_text
from dtune.config.values import check_kinds, check_values
from dtune.errors import ConfigError

_LOCAL_PATHS = (
    "model.path",
    "model.tokenizer",
    "model.chat_template",
    "data.path",
    "data.eval_path",
)


def freeze(config: DictConfig) -> str:
    """Resolve a composed config and check it by loading it strictly; its YAML text.

    Paths of files that exist are made absolute, so that the text means the same from any folder.
    Raises ConfigError for a required key without a value and for every unknown or ill-typed one.
    """
    try:
        absent = [group for group in POLYMORPHIC if OmegaConf.is_missing(config, group)]
        missing = absent or sorted(OmegaConf.missing_keys(config))
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise explain_omegaconf(error) from error
    if missing:
        raise ConfigError(
            f"no value for {', '.join(missing)}; set it on the command line, key=value"
        )
    if not str(config.run_dir).strip() or "\0" in str(config.run_dir):
        # Else it would become the working directory.
        raise ConfigError(f"run_dir={str(config.run_dir)!r} is no path; name the folder of the run")
    check_settings(OmegaConf.to_container(config))
    for key in ("run_dir", *_LOCAL_PATHS):
        value = str(OmegaConf.select(config, key))
        path = Path(value).expanduser()
        if key == "run_dir" or (key in _LOCAL_PATHS and path.exists()):
            OmegaConf.update(config, key, str(path.absolute()))
    text = OmegaConf.to_yaml(config)
    load_frozen(text)
    return text


def load_frozen(text: str, overrides: list[str] | None = None) -> RunConfig:
    """The typed config of a frozen text; strict: an unknown key or wrong type is a ConfigError.

    ``overrides`` are ``key=value`` settings put over it, as strictly.
    """
    check_text(text)
    try:
        raw = OmegaConf.create(text)
        assert isinstance(raw, DictConfig), "check_text lets only a mapping pass"
        if missing := sorted(OmegaConf.missing_keys(raw)):
            raise ConfigError(f"no value for {', '.join(missing)}")
        if overrides:
            raw = cast(DictConfig, OmegaConf.merge(raw, OmegaConf.from_dotlist(overrides)))
        typed = OmegaConf.structured(RunConfig)
        for group, registry in POLYMORPHIC.items():
            name = str(OmegaConf.select(raw, f"{group}.name"))
            if name not in registry.names():
                near = did_you_mean(near_options(name, registry.names()))
                raise ConfigError(
                    f"{group}.name={name} does not exist{near}; "
                    f"one of {', '.join(registry.names())}"
                )
            typed[group] = OmegaConf.structured(registry.config(name))
        merged = OmegaConf.merge(typed, raw)
        assert isinstance(merged, DictConfig)
        check_kinds(merged, raw)
        run = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise explain_omegaconf(error) from error
    except yaml.YAMLError as error:
        # A key that comes twice.
        raise ConfigError(f"the config is not YAML: {error}") from error
    except ConfigError:
        raise
    except ValueError as error:
        # dtune_launch knows nothing of dtune's errors; its configs raise ValueError.
        raise ConfigError(str(error)) from error
    assert isinstance(run, RunConfig)
    check_values(run)
    return run


def read_frozen(run_dir: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The config of a run folder; ConfigError if there is none."""
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"run_dir={run_dir} holds no config.yaml: it is not the folder of a run")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    return load_frozen(text, overrides)


def explain_omegaconf(error: OmegaConfBaseException) -> ConfigError:
    """Say an OmegaConf error in dtune's words: the key, what is wrong, the nearest right names."""
    key = str(error.full_key or "")
    message = str(error.msg or error).strip().splitlines()[0]
    unknown = re.search(r"Key '([^']+)' (?:is )?not in", message)
    if unknown:
        key = key or unknown.group(1)
        return ConfigError(unknown_key(key))
    if isinstance(error, InterpolationResolutionError):
        return ConfigError(f"{key}: {message}")
    enum = re.search(r"Invalid value '([^']*)', expected one of \[([^\]]*)\]", message)
    if enum:
        wrong, options = enum.group(1), enum.group(2).split(", ")
        near = did_you_mean([f"{key}={name}" for name in near_options(wrong, options)])
        return ConfigError(f"{key}={wrong} is not one of {', '.join(options)}{near}")
    return ConfigError(f"{key}: {message}" if key else message)
