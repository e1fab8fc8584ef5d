"""Whether the files that a config names are there: asked by who launches, before torch starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dtune.config.run import RunConfig
from dtune.data.sources import find_local
from dtune.errors import ConfigError
from dtune.resources import find_folder, resolve_path


def check_places(run: RunConfig) -> None:
    """Raise ConfigError for the first path of the config that leads nowhere, naming its key.

    Names on the Hub are not looked up. The nodes of a batch job may have disks that are not here.
    """
    _check_given(run)
    if run.launch.name.startswith("slurm"):
        return
    find_local(run.data.path, "data.path")
    if run.data.eval_path != "none":
        find_local(run.data.eval_path, "data.eval_path")
    folder = find_folder(run.model.path, "model.path")
    if folder is not None and not (folder / "config.json").is_file():
        raise ConfigError(f"model.path={run.model.path}: {folder} has no config.json")
    if run.model.tokenizer != "same":
        find_folder(run.model.tokenizer, "model.tokenizer")
    if run.model.chat_template != "same":
        _check(Path.is_file, "model.chat_template", run.model.chat_template, "no such file")
    if run.peft.init_from != "none":
        _check(Path.is_dir, "peft.init_from", run.peft.init_from, "there is no such folder")
    if run.resume not in ("false", "auto"):
        wanted = "there is no such folder; false, auto, or the folder of a run or of one step"
        _check(Path.exists, "resume", run.resume, wanted)


def _check_given(run: RunConfig) -> None:
    """No path is empty: that would mean the working directory."""
    given = {
        "data.path": run.data.path,
        "data.eval_path": run.data.eval_path,
        "data.cache_dir": run.data.cache_dir,
        "model.path": run.model.path,
        "model.tokenizer": run.model.tokenizer,
        "model.chat_template": run.model.chat_template,
        "peft.init_from": run.peft.init_from,
        "resume": run.resume,
    }
    for key, value in given.items():
        if not value.strip() or "\0" in value:
            raise ConfigError(f"{key}={value!r} is no path; name a file or folder, or leave it out")


def _check(is_there: Callable[[Path], bool], key: str, value: str, otherwise: str) -> None:
    if not is_there(Path(resolve_path(value)).expanduser()):
        raise ConfigError(f"{key}={value}: {otherwise}")
