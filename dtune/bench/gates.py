"""What a case must show before a number of it is printed: that it trains."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dtune.parallel.ranges import local_of
from dtune.runtime.world import World
from dtune.types import Engine

NAMED = 3
"""Parameters that a refusal names."""
_MOMENTS = ("exp_avg", "momentum_buffer")


class GradientProbe:
    """Looks at every trained parameter's gradient when the step of the block clips them."""

    def __init__(self, engine: Engine, world: World) -> None:
        self._engine = engine
        self._world = world
        self._facts: dict[str, torch.Tensor] = {}

    def __enter__(self) -> GradientProbe:
        measure = self._engine.clip

        def clip(max_norm: float) -> torch.Tensor:
            self._look()
            return measure(max_norm)

        # For one step, the engine's own method is behind this one.
        self._engine.clip = clip  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        del self._engine.clip

    def _look(self) -> None:
        for name, parameter in self._engine.module.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                self._facts[name] = _facts_of(local_of(parameter.grad), self._world)

    def problem(self) -> str:
        """What is wrong with the gradients, empty where nothing is; collective.

        Of an engine that keeps gradients to itself, the first moments of the optimizer are looked
        at instead: a mean of gradients is finite and not zero where they are.
        """
        names = [n for n, p in self._engine.module.named_parameters() if p.requires_grad]
        moments = {}
        if missing := self._world.any_says(any(name not in self._facts for name in names)):
            moments = self._moments()
        seen = [name for name in names if name in self._facts or name in moments]
        if missing and self._world.any_says(len(seen) < len(names)):
            unseen = [name for name in names if name not in seen]
            return f"the gradients of {_some(unseen)} cannot be looked at; use optim=adamw"
        facts = [self._facts.get(n, moments.get(n)) for n in names]
        whole = self._world.sum(torch.stack([fact for fact in facts if fact is not None]))
        return _judge(names, whole.tolist())

    def _moments(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for shard in self._engine.state().shards:
            kind, _, name = shard.name.partition("/")
            if kind in _MOMENTS:
                found[name] = _facts_of(shard.local, self._world)
        return found


def _facts_of(gradient: torch.Tensor, world: World) -> torch.Tensor:
    """How many elements are not finite, and how many are not zero: float64 [2] on the device."""
    bad = (~torch.isfinite(gradient)).sum()
    return torch.stack([bad, gradient.count_nonzero()]).double().to(world.device)


def _judge(names: Sequence[str], facts: Sequence[Sequence[float]]) -> str:
    bad = [name for name, (not_finite, _) in zip(names, facts, strict=True) if not_finite]
    if bad:
        return f"the gradient of {_some(bad)} is not finite"
    zero = [name for name, (_, nonzero) in zip(names, facts, strict=True) if not nonzero]
    return f"the gradient of {_some(zero)} is zero everywhere" if zero else ""


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED])
    more = len(names) - NAMED
    return f"{shown} and {more} more" if more > 0 else shown


def falls(losses: Sequence[float]) -> bool:
    """Whether the last loss on the fixed batch is below the first by more than they jump about.

    At least by one in 100,000: below that is rounding.
    """
    return len(losses) > 1 and losses[0] - losses[-1] > 1e-5 * abs(losses[0])


def loss_problem(losses: Sequence[float]) -> str:
    """Why the losses of the steps on the fixed batch are no training; empty where they are."""
    bad = next((step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)), 0)
    if bad:
        return f"the loss of step {bad} is {losses[bad - 1]}"
    if not falls(losses):
        first, last = losses[0], losses[-1]
        return (
            f"the loss on a fixed batch does not fall: {first:.5f} at step 1, {last:.5f} at step "
            f"{len(losses)}; the learning rate (optim.lr) may be far too high or too low"
        )
    return ""
