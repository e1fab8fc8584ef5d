"""Registries: a config class names a component, and builds it.

A component is a config dataclass in ``dtune/<group>/schema/<name>.py`` and its implementation in
``dtune/<group>/``. Schemas are discovered by scanning that one folder, so no list elsewhere names
them. They import neither torch nor the implementation: composing and checking a config takes
milliseconds. ``build`` imports the implementation when a run needs it.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import fields, is_dataclass
from typing import Generic, TypeVar

C = TypeVar("C")


class Registry(Generic[C]):
    """The configs of one group, by name: ``Registry("peft", PeftConfig)``."""

    def __init__(self, group: str, base: type[C], package: str) -> None:
        self.group = group
        self.base = base
        self._package = package
        self._configs: dict[str, type[C]] = {}
        self._scanned = False

    def register(self, config: type[C]) -> type[C]:
        """Add a config dataclass under the default of its ``name`` field; a class decorator."""
        assert is_dataclass(config), config
        assert issubclass(config, self.base), config
        name = next(f.default for f in fields(config) if f.name == "name")
        assert isinstance(name, str), f"{config} needs a field name: str with a default"
        owner = self._configs.get(name)
        assert owner is None, f"{self.group}={name} is registered by {owner} and by {config}"
        self._configs[name] = config
        return config

    def scan(self) -> None:
        """Import every module of the group's schema package, once."""
        if self._scanned:
            return
        self._scanned = True
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")

    def names(self) -> tuple[str, ...]:
        """All registered names, sorted."""
        self.scan()
        return tuple(sorted(self._configs))

    def config(self, name: str) -> type[C]:
        """The config class registered under ``name``; KeyError if there is none."""
        self.scan()
        return self._configs[name]
