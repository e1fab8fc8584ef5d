"""The commands of dtune: one module each, imported when it is called."""

from __future__ import annotations

import importlib
from collections.abc import Callable

COMMANDS = (
    *("train", "eval", "chat", "generate", "merge", "convert", "export"),
    *("config", "plan", "bench", "doctor", "kernels", "sweep"),
    *("status", "logs", "cancel", "verify"),
)


def load_command(name: str) -> Callable[[list[str]], int]:
    """The function of a command: takes its arguments, returns the exit code."""
    module = importlib.import_module(f"dtune.commands.{name}")
    command: Callable[[list[str]], int] = module.run
    return command
