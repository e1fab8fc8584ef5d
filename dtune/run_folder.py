"""The folder of a run: refused when something else is in it, and what is written before the start.

``config.yaml`` (frozen), ``status.json``, ``env.json``, ``metrics.jsonl``, ``logs/``,
``checkpoints/``, ``adapter/`` or ``model/``, ``report.md``, ``result.json``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dtune_launch.record import RECORD
from dtune_launch.slurm import SCRIPT

from dtune.config.run import RunConfig
from dtune.errors import ConfigError
from dtune.runtime.files import TEMPORARY, remove_tree
from dtune.runtime.lock import LOCK, check_free, holding
from dtune.runtime.status import State, Status, write_status

# Packages whose versions decide what a run computes.
PACKAGES = (
    "dtune torch transformers peft deepspeed datasets tokenizers safetensors numpy hydra-core "
    "omegaconf triton flash-attn bitsandbytes wandb".split()
)


EXPORTS = ("adapter", "model")
"""Folders of exported weights; those of the best step have ``best-`` before the name."""
ALL_EXPORTS = (*EXPORTS, *(f"best-{name}" for name in EXPORTS))


@contextmanager
def occupied_run_folder(config: RunConfig, text: str, *, command: Sequence[str]) -> Iterator[Path]:
    """Start the folder of a run as `start_run_folder` does, and hold its lock for the block."""
    folder = Path(config.run_dir)
    # Before the lock, so that nothing is written into a folder of something else.
    _check_folder(folder, resumes=resume_of_attempt(config) != "false")
    with holding(folder):
        yield start_run_folder(config, text, command=command)


def check_run_folder(config: RunConfig) -> None:
    """ConfigError where the folder of a run that starts holds something else, or another works."""
    folder = Path(config.run_dir)
    _check_folder(folder, resumes=resume_of_attempt(config) != "false")
    check_free(folder)


def start_run_folder(config: RunConfig, text: str, *, command: Sequence[str]) -> Path:
    """Make the folder of a run and write its config and environment.

    Raises ConfigError for a folder that holds something, unless it is a run that is resumed in
    it, and that no other process works at; then an older config is kept under a numbered name.
    """
    check_run_folder(config)
    folder = Path(config.run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        frozen = folder / "config.yaml"
        if frozen.is_file() and frozen.read_text(encoding="utf-8") != text:
            keep_old(frozen)
        frozen.write_text(text, encoding="utf-8")
        (folder / "env.json").write_text(_environment(command) + "\n", encoding="utf-8")
        write_status(folder, Status(State.running))
    except OSError as error:
        raise ConfigError(f"run_dir={folder} cannot be written: {error.strerror}") from error
    return folder


def resume_of_attempt(config: RunConfig) -> str:
    """``resume`` as it holds for this attempt at the run.

    One that torchrun starts after another died goes on from what that has saved, and so does a job
    that Slurm has requeued, or that is submitted again by its script; it does not go back again to
    the step of its own that ``resume`` names.
    """
    given, folder = config.resume, Path(config.run_dir).resolve()
    names_own = given not in ("false", "auto") and Path(given).resolve().is_relative_to(folder)
    goes_on = is_restart() or _is_requeued()
    return "auto" if goes_on and (names_own or given == "false") else given


def _is_requeued() -> bool:
    """Whether this job has run before, by Slurm or by its script."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return restarts > 0 or os.environ.get("DTUNE_GOES_ON", "") == "1"


def is_restart() -> bool:
    """Whether torchrun has started the ranks of this job before, and they died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def withdraw_start(folder: Path) -> None:
    """Take back what `start_run_folder` wrote, of a run whose job was not taken."""
    if not any(folder.glob("checkpoints/step-*")):
        for name in ("config.yaml", "env.json", "status.json"):
            (folder / name).unlink(missing_ok=True)


def remove_exports(folder: Path) -> None:
    """Delete the weights of an earlier end of the run, which are none of one that goes on."""
    for name in ALL_EXPORTS:
        if (folder / name).is_dir():
            remove_tree(folder / name)


def _check_folder(folder: Path, *, resumes: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run_dir={folder} is a file; name a folder")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    # Batch scripts write their logs there before the run begins.
    own = ("logs", SCRIPT, RECORD, LOCK, f"{TEMPORARY}{LOCK}")
    if not [name for name in names if not name.startswith(own)]:
        return
    if not _holds_run(folder):
        raise ConfigError(
            f"run_dir={folder} is not empty, and what it holds is no run of dtune; name another "
            "run_dir"
        )
    if not resumes:
        raise ConfigError(
            f"run_dir={folder} is not empty; set resume=auto to go on with the run in it, "
            "or name another run_dir"
        )


def _holds_run(folder: Path) -> bool:
    if (folder / "status.json").is_file() or any(folder.glob("checkpoints/step-*")):
        return True
    config = folder / "config.yaml"
    # Not the config.yaml of another program.
    return config.is_file() and "\nrun_dir:" in f"\n{config.read_text(encoding='utf-8')}"


def keep_old(path: Path) -> None:
    """Give a file that is there a numbered name: ``metrics.jsonl`` becomes ``metrics.1.jsonl``."""
    if not path.is_file():
        return
    number = 1
    while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(kept)


def _environment(command: Sequence[str]) -> str:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    record = {
        "command": list(command),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "working_directory": os.getcwd(),
        "python": platform.python_version(),
        "machine": {"host": platform.node(), "system": platform.platform(), "cpus": os.cpu_count()},
        "git": _git_revision(),
        "versions": versions,
    }
    return json.dumps(record, indent=1)


def _git_revision() -> str:
    """Commit of the working directory, with ``-dirty``; empty outside a repository."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=False,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
