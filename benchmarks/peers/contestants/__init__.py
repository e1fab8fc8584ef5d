"""One file a contestant; each is found by its name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol

from benchmarks.peers.work import Setting, Work

if TYPE_CHECKING:
    from benchmarks.peers.watch import Watch

MODULES = {
    "dtune": "dtune_own",
    "hf-peft": "hf_peft",
    "liger": "liger",
    "trl": "trl_sft",
    "unsloth": "unsloth_sft",
    "torchtune": "torchtune_lora",
    "axolotl": "axolotl_kernels",
}
"""File by name of the contestant, in the order of the table."""


class Contestant(Protocol):
    """What a contestant's module has."""

    TITLE: str
    """What it is, for the table."""
    PACKAGES: tuple[str, ...]
    """Distributions whose versions are reported."""
    FIRST: tuple[str, ...]
    """Modules to import before transformers, which they change."""

    def settings(self, work: Work) -> tuple[Setting, ...]:
        """How it can be set up for this work; ``best`` only where that differs from the rest."""
        ...

    def problem(self, work: Work) -> str:
        """Why it cannot run here; empty where it can. Imports nothing heavy."""
        ...

    def run(self, work: Work, setting: Setting, watch: Watch) -> None:
        """Train ``work.total_steps`` optimizer steps and show each to the watch."""
        ...


def find(name: str) -> Contestant:
    """The contestant of a name."""
    module: Contestant = importlib.import_module(f"{__name__}.{MODULES[name]}")  # type: ignore[assignment]
    return module
