"""What a case must show before a number of it is printed: that it trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from statistics import median

import torch
from torch.utils.hooks import RemovableHandle

from dtune.parallel.ranges import local_of
from dtune.runtime.world import World
from dtune.types import Engine

NAMED = 3
"""Parameters that a refusal names."""
_LEAST_FALL = 1e-5
"""Share of the first loss; below that is rounding."""
_JUMPS = 4.0
"""Times the usual bend of the curve by which it must fall: a loss that only jumps about does so
once in some thousand looks at 30 steps, and once in a hundred at 6."""


class GradientProbe:
    """Looks at every trained parameter's gradient in one optimizer step.

    Where the engine has it at the clipping, there, as the optimizer will see it. DeepSpeed keeps
    it to itself: then as autograd gives it, on each rank for its own micro batches.
    """

    def __init__(self, engine: Engine, world: World) -> None:
        self._engine = engine
        self._world = world
        self._trained = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
        self._kept: dict[str, torch.Tensor] = {}
        self._passing: dict[str, torch.Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> GradientProbe:
        measure = self._engine.clip

        def clip(max_norm: float) -> torch.Tensor:
            self._look()
            return measure(max_norm)

        # For one step, the engine's own method is behind this one.
        self._engine.clip = clip  # type: ignore[method-assign]
        for name, parameter in self._trained.items():
            self._hooks.append(parameter.register_hook(partial(self._pass, name)))
        return self

    def __exit__(self, *error: object) -> None:
        del self._engine.clip
        for hook in self._hooks:
            hook.remove()

    def _look(self) -> None:
        for name, parameter in self._trained.items():
            if parameter.grad is not None:
                self._kept[name] = _facts_of(local_of(parameter.grad), self._world)

    def _pass(self, name: str, gradient: torch.Tensor) -> None:
        facts = _facts_of(local_of(gradient), self._world)
        self._passing[name] = self._passing[name] + facts if name in self._passing else facts

    def problem(self) -> str:
        """What is wrong with the gradients, empty where nothing is; collective."""
        none = torch.zeros(2, dtype=torch.float64, device=self._world.device)
        seen = {**self._passing, **self._kept}
        facts = [seen.get(name, none) for name in self._trained]
        whole = self._world.sum(torch.stack(facts))
        return _judge(list(self._trained), whole.tolist())


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

    How far they jump is told by the bends of the curve, which is straight where nothing is random.
    """
    if len(losses) < 2:
        return False
    threes = zip(losses, losses[1:], losses[2:], strict=False)
    bends = [abs(one - 2 * two + three) for one, two, three in threes]
    least = max(_LEAST_FALL * abs(losses[0]), _JUMPS * median(bends) if bends else 0.0)
    return losses[0] - losses[-1] > least


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
