"""The Trainer of transformers with a model of ``peft``."""

from __future__ import annotations

from benchmarks.peers.watch import Watch
from benchmarks.peers.work import BEST, PLAIN, RECOMPUTED, Setting, Work, missing

TITLE = "HF Trainer + peft"
PACKAGES = ("accelerate",)
FIRST: tuple[str, ...] = ()


def settings(work: Work) -> tuple[Setting, ...]:
    """Best: ``torch_compile``, as the performance guide of transformers advises."""
    return (PLAIN, RECOMPUTED, BEST)


def problem(work: Work) -> str:
    """Why it cannot run here."""
    return missing("transformers", "peft", "accelerate")


def run(work: Work, setting: Setting, watch: Watch) -> None:
    """Train."""
    from benchmarks.peers.contestants.hf_trainer import load_adapted, train_with_trainer

    watch.start_building()
    train_with_trainer(load_adapted(work), work, setting, watch, torch_compile=setting.best)
