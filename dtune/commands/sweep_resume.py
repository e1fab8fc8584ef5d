"""Going on with a sweep: the command that began it, once more, on what is not done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dtune.config.compose import compose
from dtune.errors import ConfigError
from dtune.sweep.ended import exit_code
from dtune.sweep.folder import read_sweep

_ALLOWED = ("hydra/launcher", "launch")
_ALLOWED_BELOW = ("hydra.launcher.", "hydra.sweeper.", "launch.")
_OWN = ("hydra.sweep.dir", "hydra.launcher.resume", "hydra.launcher.pruned")


def go_on(sweep: Path, settings: Sequence[str], *, pruned: bool) -> int:
    """Run what is not done; the exit code as that of ``dtune train -m``."""
    record = read_sweep(sweep)
    for setting in settings:
        key = _key(setting)
        if not key.startswith(_ALLOWED_BELOW) and key not in _ALLOWED:
            raise ConfigError(
                f"dtune sweep resume takes settings of the launcher (hydra.launcher.*, "
                f"hydra/launcher, launch.*), not {key}: what trials train is frozen in {sweep}"
            )
    argv = [*merge_settings(record.command, settings), f"hydra.sweep.dir={sweep}"]
    argv += ["hydra.launcher.resume=true", f"hydra.launcher.pruned={str(pruned).lower()}"]
    if not {"-m", "--multirun"} & set(argv):
        argv.insert(0, "--multirun")
    if Path(record.directory).is_dir():
        os.chdir(record.directory)  # Paths of the command are relative to it.
    compose("train", argv)
    return exit_code()


def merge_settings(command: Sequence[str], settings: Sequence[str]) -> list[str]:
    """The arguments of the command that began a sweep, with settings in place of its own.

    Another launcher or another ``launch`` has other keys: those of the one before are dropped.
    """
    given = {_key(setting) for setting in settings}
    dropped = tuple(
        prefix
        for group, prefix in (("hydra/launcher", "hydra.launcher."), ("launch", "launch."))
        if group in given
    )
    kept = [
        argument
        for argument in command
        if argument.startswith("-")
        or not (
            _key(argument) in given
            or _key(argument) in _OWN
            or (dropped and _key(argument).startswith(dropped))
        )
    ]
    return [*kept, *settings]


def _key(setting: str) -> str:
    return setting.lstrip("+~").partition("=")[0]
