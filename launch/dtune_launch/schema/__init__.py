"""Configs of the launchers, one module each. Imports the standard library only."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import fields

from dtune_launch.spec import LaunchConfig


def launchers() -> dict[str, type[LaunchConfig]]:
    """The config of every launcher in this folder, by its name."""
    found: dict[str, type[LaunchConfig]] = {}
    for module in pkgutil.iter_modules(__path__):
        content = vars(importlib.import_module(f"{__name__}.{module.name}"))
        for value in content.values():
            if isinstance(value, type) and issubclass(value, LaunchConfig):
                name = next(field.default for field in fields(value) if field.name == "name")
                if isinstance(name, str) and name != "???":
                    found[name] = value
    return dict(sorted(found.items()))
