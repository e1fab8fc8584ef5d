"""What the ranks of a pool begin with: imported once, and not looked through for garbage again."""

from __future__ import annotations

import importlib

from dtune.runtime.imports import uncollected

with uncollected():
    for module in ("dtune.assemble", "dtune.config.compose", "peft"):
        importlib.import_module(module)
