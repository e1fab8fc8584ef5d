"""A run reduced to what a checkpoint sees: tensors, how they are split, and counters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from dtune.checkpoint.manifest import Identity
from dtune.checkpoint.schema import CheckpointConfig
from dtune.checkpoint.writer import Checkpointer
from dtune.runtime.schema import Recompute
from dtune.runtime.world import World
from dtune.types import (
    EngineState,
    FlatShard,
    ModelSpec,
    OptimizerFactory,
    ScheduleFactory,
    TensorSource,
)

SHAPES = {
    "param/layers.0.weight": (6, 5),
    "exp_avg/layers.0.weight": (6, 5),
    "param/layers.1.bias": (7,),
    "exp_avg/layers.1.bias": (7,),
    "param/scale": (),
    "param/none": (0, 4),
}
DTYPES = {"exp_avg/layers.1.bias": torch.bfloat16}
IDENTITY = Identity("tiny@1", "data@1", {"optim.name": "adamw", "peft.targets": ["q_proj"]}, "test")

Split = Callable[[int, int, int], tuple[int, int]]
"""Elements of a tensor, rank, ranks -> the range of the rank."""


def evenly(total: int, rank: int, size: int) -> tuple[int, int]:
    return total * rank // size, total * (rank + 1) // size


def lopsided(total: int, rank: int, size: int) -> tuple[int, int]:
    """All but 3 elements to the last rank; tensors of up to 3 to the first."""
    head = min(3, total)
    return ((0, head), (head, total))[rank] if size == 2 else (0, total)


class HoldingEngine:
    """An engine that only holds: every value is a function of the step."""

    model: nn.Module
    grad_scale = 1.0
    skipped_steps = 0

    def __init__(
        self,
        world: World,
        *,
        split: Split = evenly,
        shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    ) -> None:
        self.rank, self.size = world.rank, world.size
        self.split, self.shapes = split, shapes
        self.scalars: dict[str, float | int] = {}
        self.values: dict[str, torch.Tensor] = {}
        self.set_step(0)

    def set_step(self, step: int) -> None:
        self.scalars = {"optimizer_step": step, "loss_scale": 0.1 * step}
        for name in self.shapes:
            start, stop = self.range_of(name)
            self.values[name] = expected(name, step, self.shapes)[start:stop].clone()

    def range_of(self, name: str) -> tuple[int, int]:
        return self.split(torch.Size(self.shapes[name]).numel(), self.rank, self.size)

    def state(self) -> EngineState:
        shards = [
            FlatShard(name, shape, self.range_of(name)[0], self.values[name])
            for name, shape in self.shapes.items()
        ]
        return EngineState(shards, dict(self.scalars))

    def load_state(self, source: TensorSource, scalars: Mapping[str, float | int]) -> None:
        for name, values in self.values.items():
            assert source.shape(name) == self.shapes[name]
            values.copy_(source.read(name, *self.range_of(name)))
        self.scalars = dict(scalars)

    def holds(self, step: int) -> bool:
        """Whether every value is exactly that of a step."""
        same = all(
            torch.equal(values, expected(name, step, self.shapes)[slice(*self.range_of(name))])
            for name, values in self.values.items()
        )
        return same and self.scalars == {"optimizer_step": step, "loss_scale": 0.1 * step}

    def prepare(
        self,
        model: nn.Module,
        spec: ModelSpec,
        *,
        source: TensorSource,
        optimizer: OptimizerFactory,
        schedule: ScheduleFactory,
        recompute: Recompute,
        compile_blocks: bool,
    ) -> None:
        raise NotImplementedError

    def micro(self, *, last: bool) -> AbstractContextManager[None]:
        raise NotImplementedError

    def backward(self, loss: torch.Tensor) -> None:
        raise NotImplementedError

    def clip(self, max_norm: float) -> torch.Tensor:
        raise NotImplementedError

    def step(self) -> None:
        raise NotImplementedError

    def learning_rate(self) -> float:
        raise NotImplementedError

    def full_tensors(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        raise NotImplementedError


def expected(name: str, step: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> torch.Tensor:
    """The flattened values of a tensor at a step."""
    generator = torch.Generator().manual_seed(1000 * step + sorted(shapes).index(name))
    values = torch.randn(torch.Size(shapes[name]).numel(), generator=generator)
    return values.to(DTYPES.get(name, torch.float32))


def save_step(
    checkpointer: Checkpointer,
    engine: HoldingEngine,
    step: int,
    *,
    is_best: bool = False,
    identity: Identity = IDENTITY,
) -> None:
    engine.set_step(step)
    extra = {"position": step, "best": 0.5, "history": [1.0, 1 / 3]}
    checkpointer.save(step, engine.state(), extra, is_best=is_best, identity=identity)


def write_run(
    run_dir: Path, world: World, *steps: int, keep: int = 9, best: int | None = None
) -> Path:
    """Checkpoints of these steps; the folder that holds them."""
    folder = run_dir / "checkpoints"
    engine = HoldingEngine(world)
    with Checkpointer(folder, CheckpointConfig(keep=keep), world) as checkpointer:
        for step in steps:
            save_step(checkpointer, engine, step, is_best=step == best)
    return folder


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
