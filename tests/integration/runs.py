"""Cases that run whole trainings inside a pool of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dtune.assemble import assemble
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.run_folder import start_run_folder
from dtune.runtime.seed import seed_everything
from dtune.runtime.signals import StopRequest
from dtune.runtime.world import World
from dtune.train.finish import finish_run
from dtune.train.sinks.base import Row


@dataclass
class StopAt:
    """A sink that asks the run to stop once a step has been logged, as a signal would."""

    step: int
    stop: StopRequest

    def write(self, row: Row) -> None:
        if row["kind"] == "train" and row["step"] == self.step:
            self.stop.signal_name = "SIGUSR1"

    def close(self) -> None:
        """Nothing is held."""


def train(world: World, *, overrides: list[str], stop_at: int = 0) -> str:
    """A whole run as ``dtune train`` does it, stopped after ``stop_at`` steps; how it ended."""
    # As ``dtune train`` does it: composed once, which takes a third of a second.
    text = world.broadcast(compose_overrides("train", overrides) if world.is_first else "")
    run = load_frozen(text)
    if world.is_first:
        start_run_folder(run, text, command=["dtune", "train", *overrides])
    world.barrier()
    seed_everything(run.seed, world.rank)
    trainer, exporter = assemble(run, world)
    if stop_at:
        trainer.sinks = [*trainer.sinks, StopAt(stop_at, trainer.stop)]
    state = trainer.fit(evaluate_before=run.evaluate.before)
    finish_run(trainer, state, exporter, title="test")
    return state.value


def exported(run_dir: Path) -> dict[str, bytes]:
    """Bytes of every exported weight file, by its path in the run folder."""
    files = [
        path for name in ("adapter", "model") for path in run_dir.glob(f"{name}/*.safetensors")
    ]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}
