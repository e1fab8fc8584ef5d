"""No secret in settings: they are written into run folders and scripts, and ``ps`` shows them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence

from dtune.errors import ConfigError

# The last word of a key, or the name of a variable.
_NAME = re.compile(
    r"(^|[_.-])(token|api_?key|access_?key|secret_?key|password|passwd|secret|credentials?)$",
    re.IGNORECASE,
)
# max_new_token=3 is a misspelt key.
_SHORT_NUMBER = re.compile(r"\d{1,5}")
# What they look like: Hugging Face, Weights & Biases, OpenAI, GitHub, GitLab, AWS, Slack.
_VALUES = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}\b"
    r"|\b(local-)[0-9a-f]{40}\b|\bwandb_v\d+_\w{20,}"
    r"|\bsk-[A-Za-z0-9_-]{20,}"
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}\b|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\bxox[abpr]-[\w-]{10,}"
)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s@]+@", re.IGNORECASE)
# A key of Weights & Biases; a commit looks the same.
_HEX = re.compile(r"[0-9a-f]{40}")
_COMMITS = ("revision", "commit", "sha")
# In a line of shell; `TOKEN=$(cat FILE)` and `TOKEN=$OTHER` hold none.
_ASSIGNED = re.compile(
    r"\b\w*(token|api_?key|access_?key|secret|password)\w*=(?![\"']?\$)[\"']?[^\s\"']{6,}",
    re.IGNORECASE,
)
# Shorter values of variables stand in other words too.
_SHORTEST = 8


def check_arguments(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError for an argument that holds a secret; names its key and not its value."""
    for number, argument in enumerate(argv, start=1):
        key, equals, value = argument.partition("=")
        name = key.lstrip("+~-") if equals else f"argument {number}"
        check_value(name, value if equals else argument, environ)


def check_settings(settings: object, environ: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError for a value in nested settings that is a secret; names its key."""
    for key, value in _leaves(settings, ""):
        check_value(key, value, environ)


def check_value(key: str, value: str, environ: Mapping[str, str] | None = None) -> None:
    """Raise ConfigError if a setting holds a secret, or is named as one; does not say the value."""
    why = _why(key, value, os.environ if environ is None else environ)
    if why:
        raise ConfigError(
            f"{key} {why}: settings are written into the run folder, and everyone on the machine "
            "sees a command line; put it into the environment instead (as HF_TOKEN or "
            "WANDB_API_KEY), which jobs inherit, and leave it out here"
        )


def _why(key: str, value: str, environ: Mapping[str, str]) -> str:
    if not value:
        return ""
    if _NAME.search(key) and not _SHORT_NUMBER.fullmatch(value):
        return "is the name of a secret"
    for name, secret in environ.items():
        if len(secret) >= _SHORTEST and _NAME.search(name) and secret in value:
            return f"holds the value of the variable {name}"
    is_commit = key.rpartition(".")[2].endswith(_COMMITS)
    if _VALUES.search(value) or (_HEX.fullmatch(value) and not is_commit):
        return "looks like a token or key"
    if _URL.search(value):
        return "is a URL with a password"
    is_shell = key.startswith("launch.")
    return "sets a variable to a secret" if is_shell and _ASSIGNED.search(value) else ""


def _leaves(settings: object, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from _leaves(value, prefix)
    elif settings is not None:
        yield prefix, str(settings)
