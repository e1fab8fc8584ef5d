"""What patches have in common: how a module's forward is replaced and put back, and the table.

A patch replaces the class of single modules by a subclass with another ``forward``. Names,
parameters, hooks and ``isinstance`` stay as they were, other models in the process are not
touched, and patches of one module stack.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from torch import nn

from dtune.types import ModelSpec


@dataclass(frozen=True)
class Change:
    """A module that a patch replaces; ``apply`` does it."""

    path: str
    before: str
    after: str
    apply: Callable[[], None]


@dataclass(frozen=True)
class Kept:
    """A module that a patch is for and cannot take, and why."""

    path: str
    before: str
    reason: str


@dataclass(frozen=True)
class PatchRow:
    """What one patch did, or did not, to modules that are alike."""

    patch: str
    modules: str
    """Their paths, with ``*`` for the numbers."""
    before: str
    after: str
    """What they are now; the same as ``before`` where they were kept."""
    count: int
    reason: str = ""
    """Why they were kept; empty where they were replaced."""

    def __str__(self) -> str:
        if self.reason:
            return (
                f"{self.patch}: kept {self.count} x {self.before} ({self.modules}): {self.reason}"
            )
        return f"{self.patch}: {self.count} x {self.before} ({self.modules}) -> {self.after}"


class Plan(Protocol):
    """A patch: finds what it would do to a model; touches nothing."""

    __module__: str

    def __call__(self, model: nn.Module, spec: ModelSpec, enabled: frozenset[str]) -> Found:
        """``enabled`` names all patches that will be applied."""
        ...


@dataclass
class Found:
    """Modules of one patch, in module order."""

    changes: list[Change] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)


class Stage(Enum):
    """When a patch comes: each takes what those before it have left, and builds on it."""

    functions = 0
    groups = 1
    modules = 2


@dataclass(frozen=True)
class Patch:
    """An entry of the registry."""

    name: str
    stage: Stage
    plan: Plan


PATCHES: dict[str, Patch] = {}


def patch(stage: Stage) -> Callable[[Plan], Plan]:
    """Register a patch under the name of its module: one file of ``patches`` each."""

    def register(plan: Plan) -> Plan:
        name = plan.__module__.rpartition(".")[2]
        PATCHES[name] = Patch(name, stage, plan)
        return plan

    return register


def patch_names() -> tuple[str, ...]:
    """All patches; imports them on the first call."""
    package = importlib.import_module("dtune.patch.patches")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return tuple(PATCHES)


def replace_forward(
    module: nn.Module,
    forward: Callable[..., Any],
    *,
    after: str,
    trait: type = object,
    name: str = "forward",
) -> None:
    """Give one module another forward and a trait, by a subclass that is called ``after``.

    ``name``: the method that is replaced.
    """
    cls = type(module)
    key = (cls, forward, after, trait, name)
    if key not in _subclasses:
        bases = (cls,) if trait is object else (cls, trait)
        _subclasses[key] = type(after, bases, {name: forward, "original_class": cls})
    module.__class__ = _subclasses[key]


_subclasses: dict[tuple[object, ...], type[nn.Module]] = {}
"""Made once for modules that are alike, so that torch.compile sees one class."""


def restore_forward(module: nn.Module) -> bool:
    """Take back every ``replace_forward`` of a module; whether there was one."""
    restored = False
    while "original_class" in vars(type(module)):
        module.__class__ = vars(type(module))["original_class"]
        restored = True
    return restored


def is_replaced(module: nn.Module) -> bool:
    """Whether a module has another forward now, also below what an engine made of its class."""
    return any("original_class" in vars(cls) for cls in type(module).__mro__)


def kind_of(module: nn.Module) -> str:
    """Name of a module's class as it was before any patch."""
    return next(c for c in type(module).__mro__ if "original_class" not in vars(c)).__name__


def forward_of(module: nn.Module) -> Callable[..., Any]:
    """The forward of a module's class, before it is bound: patched as far as it is by now."""
    return type(module).forward


def rows_of(name: str, found: Found) -> Iterator[PatchRow]:
    """Count the modules that are alike."""
    changed: dict[tuple[str, str, str], int] = {}
    for change in found.changes:
        key = (_glob(change.path), change.before, change.after)
        changed[key] = changed.get(key, 0) + 1
    for (modules, before, after), count in changed.items():
        yield PatchRow(name, modules, before, after, count)
    kept: dict[tuple[str, str, str], int] = {}
    for one in found.kept:
        key = (_glob(one.path), one.before, one.reason)
        kept[key] = kept.get(key, 0) + 1
    for (modules, before, reason), count in kept.items():
        yield PatchRow(name, modules, before, before, count, reason)


def _glob(path: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", path)
