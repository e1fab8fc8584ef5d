"""dtune itself, by the way of every run: a composed config, ``assemble``, ``fit``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.peers.inputs import texts_path
from benchmarks.peers.watch import Watch
from benchmarks.peers.work import BEST, PLAIN, RECOMPUTED, Setting, Work

if TYPE_CHECKING:
    from dtune.train.trainer import Trainer
    from dtune.types import Batch

TITLE = "dtune"
PACKAGES = ("dtune",)
FIRST: tuple[str, ...] = ()


def settings(work: Work) -> tuple[Setting, ...]:
    """Best: ``train.compile=true``."""
    return (PLAIN, RECOMPUTED, BEST)


def problem(work: Work) -> str:
    """Runs wherever this does."""
    return ""


def overrides(work: Work, setting: Setting, folder: Path) -> list[str]:
    """The settings of ``dtune train`` that do the work."""
    return [
        f"run_dir={folder / 'run'}",
        f"model.path={work.checkpoint}",
        "model=custom",
        "peft=lora",
        f"peft.rank={work.rank}",
        f"peft.alpha={work.alpha}",
        f"peft.init_from={work.adapter}",
        "kernels=auto",
        f"precision={work.precision}",
        "objective=pretrain",
        "data=text",
        f"data.path={texts_path(work)}",
        "data.eval_path=none",
        f"data.max_length={work.length}",
        "data.shuffle=false",
        f"data.cache_dir={folder / 'cache'}",
        f"optim.lr={work.lr}",
        "schedule=constant",
        f"train.max_steps={work.total_steps}",
        f"train.micro_batch_size={work.micro_batch}",
        f"train.global_batch_size={work.rows}",
        f"train.max_norm={work.max_norm}",
        f"train.recompute={'full' if setting.recompute else 'none'}",
        f"train.compile={str(setting.best).lower()}",
        "train.warmup_steps_untimed=0",
        # Numbers are brought to the host at the end: peers are not logged either.
        f"log.every={work.total_steps + 1}",
        "log.progress=lines",
    ]


def run(work: Work, setting: Setting, watch: Watch) -> None:
    """Train."""
    from dtune.assemble import assemble
    from dtune.config.compose import compose_overrides
    from dtune.config.freeze import load_frozen
    from dtune.run_folder import start_run_folder
    from dtune.runtime.seed import seed_everything
    from dtune.runtime.world import World

    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        settings = overrides(work, setting, Path(folder))
        text = compose_overrides("train", settings)
        config = load_frozen(text)
        start_run_folder(config, text, command=["dtune", "train", *settings])
        world = World.start()
        try:
            watch.start_building()
            seed_everything(config.seed, world.rank)
            trainer, _ = assemble(config, world)
            _show(trainer, watch)
            watch.start_training()
            trainer.fit(evaluate_before=False)
        finally:
            world.stop()


def _show(trainer: Trainer, watch: Watch) -> None:
    """Let the watch see losses, gradients and steps; what the trainer does stays the same."""
    engine, advance = trainer.engine, trainer.advance
    backward, clip = engine.backward, engine.clip

    def shown_backward(loss: torch.Tensor) -> None:
        watch.add_loss(loss / engine.grad_scale)
        backward(loss)

    def shown_clip(max_norm: float) -> torch.Tensor:
        norm = clip(max_norm)
        if watch.wants_gradients:
            watch.see_gradients(engine.module.named_parameters())
        return norm

    def shown_advance(step: int, batches: Sequence[Batch]) -> None:
        advance(step, batches)
        watch.end_step()

    engine.backward, engine.clip = shown_backward, shown_clip  # type: ignore[method-assign]
    trainer.advance = shown_advance  # type: ignore[method-assign]
