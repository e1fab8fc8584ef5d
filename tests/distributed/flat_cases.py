"""Cases about an optimizer over one buffer, run by every rank of a pool."""

from __future__ import annotations

from typing import Any

import torch

from dtune.optim.flat import FlatAdamW
from dtune.parallel.base import TorchEngine
from dtune.runtime.world import World
from tests.distributed.operations import Operations
from tests.distributed.training import Setup, build, copied, put_back, train


def operations(world: World, *, setup: Setup) -> dict[str, Any]:
    """Operations of the second optimizer step, the size of the model, and what steps it."""
    built = build(world, setup)
    engine = built.engine
    train(world, engine, setup, range(1))
    names = Operations()
    with names:
        train(world, engine, setup, range(1, 2))
    assert isinstance(engine, TorchEngine)
    return {
        "counts": dict(names.counts),
        "parameters": sum(p.requires_grad for p in engine.module.parameters()),
        "groups": len(engine._optimizer.param_groups),
        "flat": isinstance(engine._optimizer, FlatAdamW),
    }


def moved(world: World, *, setup: Setup, other: Setup, at: int) -> dict[str, Any]:
    """Train, go on in an engine with another optimizer, and say what it took over."""
    first = build(world, setup)
    train(world, first.engine, setup, range(at))
    source, scalars = copied(world, first)
    then = build(world, other)
    put_back(world, then, (source, scalars))
    taken = then.engine.state()
    own = first.engine.state()
    return {
        "names": [s.name for s in taken.shards] == [s.name for s in own.shards],
        "equal": all(
            torch.equal(s.local, source.read(s.name, s.start, s.stop)) for s in taken.shards
        ),
        "scalars": taken.scalars == scalars,
        "shards": len(taken.shards),
        "stayed": train(world, first.engine, setup, range(at, setup.steps)),
        "went_on": train(world, then.engine, other, range(at, setup.steps)),
    }


def blocked(world: World, *, setup: Setup) -> dict[str, bool]:
    """A blocked step between two others: what it changes, and whether the host waited for it."""
    built = build(world, setup)
    engine: Any = built.engine
    train(world, engine, setup, range(1))
    before, scalars = copied(world, built)
    names = Operations()
    real_step = engine.step

    def stop(_: torch.Tensor | None = None) -> None:
        with names:
            real_step(torch.ones((), dtype=torch.bool))

    engine.step = stop
    train(world, engine, setup, range(1, 2))
    after = engine.state()
    return {
        "unchanged": all(
            torch.equal(s.local, before.read(s.name, s.start, s.stop)) for s in after.shards
        ),
        "not_counted": after.scalars["optimizer_step"] == scalars["optimizer_step"],
        "waited": names.counts["aten::_local_scalar_dense"] > 0,
    }
