"""The Trainer of transformers with a model of ``peft`` and the kernels of Liger."""

from __future__ import annotations

from benchmarks.peers.watch import Watch
from benchmarks.peers.work import PLAIN, RECOMPUTED, Setting, Work, missing

TITLE = "HF Trainer + peft + Liger"
PACKAGES = ("liger-kernel", "accelerate")
FIRST: tuple[str, ...] = ()


def settings(work: Work) -> tuple[Setting, ...]:
    """``use_liger_kernel`` is all that its documentation advises; there is no other best."""
    return (PLAIN, RECOMPUTED)


def problem(work: Work) -> str:
    """Why it cannot run here."""
    if absent := missing("liger_kernel", "peft", "accelerate"):
        return absent
    return "" if work.device == "cuda" else "its kernels are Triton's, which run on a GPU only"


def run(work: Work, setting: Setting, watch: Watch) -> None:
    """Train."""
    from benchmarks.peers.contestants.hf_trainer import load_adapted, train_with_trainer

    watch.start_building()
    train_with_trainer(load_adapted(work), work, setting, watch, use_liger_kernel=True)
