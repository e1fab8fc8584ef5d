"""Changes one module for a test. Python runs this file at its start where PYTHONPATH names its
folder, so the whole command is the real one and no code of dtune knows of it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

TRAINER = "dtune.train.trainer"


class Finder(importlib.abc.MetaPathFinder):
    """Finds a module as others do, and patches it once it has been loaded."""

    def __init__(self, patch: Callable[[ModuleType], None], module: str = TRAINER) -> None:
        self.patch = patch
        self.module = module

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_patch(module: ModuleType) -> None:
            load(module)
            self.patch(module)

        spec.loader.exec_module = load_and_patch  # type: ignore[method-assign]
        return spec


if "DTUNE_TEST_FAULTS" in os.environ and "dtune.worker" in sys.orig_argv:
    import injected_faults

    sys.meta_path.insert(0, Finder(injected_faults.patch))
if os.environ.get("DTUNE_TEST_HOLD_AT", "0") != "0":
    import injected_waits

    sys.meta_path.insert(0, Finder(injected_waits.patch))
if "DTUNE_TEST_WAIT_IN" in os.environ:
    import injected_stops

    sys.meta_path.insert(0, Finder(injected_stops.patch, injected_stops.MODULE))
