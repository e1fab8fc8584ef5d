"""Which sinks a run has."""

from __future__ import annotations

from pathlib import Path

from dtune.runtime.schema import LogConfig
from dtune.runtime.world import World
from dtune.train.sinks.base import Sink
from dtune.train.sinks.jsonl import JsonlSink
from dtune.train.sinks.progress import BarSink, LineSink, wants_bar
from dtune.train.sinks.trackers import TensorBoardSink, WandbSink


def build_sinks(
    config: LogConfig,
    run_dir: Path,
    world: World,
    *,
    start_step: int,
    total_steps: int,
    settings: dict[str, object],
) -> list[Sink]:
    """The sinks of this rank: none but on the first. ``settings`` is what wandb shows as config."""
    if not world.is_first:
        return []
    progress = (
        BarSink(total_steps, start_step)
        if wants_bar(config.progress)
        else LineSink(total_steps, config.every)
    )
    sinks: list[Sink] = [JsonlSink(run_dir / "metrics.jsonl"), progress]
    if config.tensorboard:
        sinks.append(TensorBoardSink(run_dir / "tensorboard", start_step))
    if config.wandb:
        sinks.append(
            WandbSink(
                run_dir / "wandb",
                project=config.wandb_project,
                mode=config.wandb_mode,
                config=settings,
            )
        )
    return sinks
