"""Which sinks a run has."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from dtune.runtime.capabilities import require
from dtune.runtime.schema import LogConfig
from dtune.runtime.world import World
from dtune.train.sinks.background import BackgroundSink, TrackerReport
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
    """The sinks of this rank: none but on the first. ``settings`` is what wandb shows as config.

    Raises ConfigError where a tracker is not installed. What else goes wrong with one is logged,
    and training goes on.
    """
    if config.tensorboard:
        require("tensorboard", "log.tensorboard=true")
    if config.wandb:
        require("wandb", "log.wandb=true")
    if not world.is_first:
        return []
    progress = (
        BarSink(total_steps, start_step)
        if wants_bar(config.progress)
        else LineSink(total_steps, config.every)
    )
    sinks: list[Sink] = [JsonlSink(run_dir / "metrics.jsonl"), progress]
    if config.tensorboard:
        _import("torch.utils.tensorboard")
        make = partial(TensorBoardSink, run_dir / "tensorboard", start_step)
        sinks.append(BackgroundSink("tensorboard", make))
    if config.wandb:
        _import("wandb")
        run = partial(
            WandbSink,
            run_dir / "wandb",
            project=config.wandb_project,
            mode=config.wandb_mode,
            config=settings,
        )
        sinks.append(BackgroundSink("wandb", run))
    return sinks


def _import(module: str) -> None:
    """Import what a tracker needs, before any has a thread.

    Two threads that import parts of one another may each get a half.
    """
    # What is wrong with it, its own thread comes to as well, and says.
    with suppress(Exception):
        importlib.import_module(module)


def close_sinks(sinks: Sequence[Sink], *, seconds: float) -> None:
    """Close all of them, and wait for each tracker so many seconds at most.

    CheckpointError where rows of metrics.jsonl could not be written.
    """
    with ExitStack() as stack:
        # In their order, and all of them where one raises.
        for sink in reversed(sinks):
            if isinstance(sink, BackgroundSink):
                sink.close_seconds = seconds
            stack.callback(sink.close)


def report_trackers(sinks: Sequence[Sink]) -> list[TrackerReport]:
    """What became of the rows of every tracker."""
    return [sink.report() for sink in sinks if isinstance(sink, BackgroundSink)]
