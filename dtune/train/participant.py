"""A method that takes part in steps: its share of a step's gradient, and of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from dtune.runtime.world import World
from dtune.types import EngineState, FlatShard, Stateful, TakesPartInSteps, TensorSource

METHOD = "method/"
"""Prefix of the method's tensors in a checkpoint."""


@dataclass(frozen=True)
class WithMethod:
    """What a checkpoint is taken of: the engine, and the method where it has a state."""

    engine: Stateful
    participant: TakesPartInSteps | None
    world: World

    @torch.no_grad()
    def state(self) -> EngineState:
        """The engine's state, and after it the method's, which is equal on all ranks."""
        state = self.engine.state()
        return replace(state, shards=[*state.shards, *self._shards()])

    @torch.no_grad()
    def load_state(self, source: TensorSource, scalars: Mapping[str, float | int]) -> None:
        """Go on where a state was taken."""
        self.engine.load_state(source, scalars)
        for shard in self._shards():
            shard.local.copy_(source.read(shard.name, shard.start, shard.stop))

    def _shards(self) -> list[FlatShard]:
        if self.participant is None:
            return []
        return [
            FlatShard(
                f"{METHOD}{name}",
                tuple(tensor.shape),
                0,
                tensor.detach().view(-1),
                saved_here=self.world.is_first,
            )
            for name, tensor in self.participant.state().items()
        ]
