"""One cell of the matrix, run by every rank of a pool: train, go on from the middle, export."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from dtune.evaluate.mode import evaluating
from dtune.models.load import load_tokenizer
from dtune.models.schema import ModelConfig
from dtune.runtime.world import World
from dtune.train.export import Exporter
from dtune.types import NUM_DOCUMENTS, Batch, Engine
from tests.distributed.training import Setup, build, copied, make_batch, put_back, train
from tests.matrix.loading import load_exported

STEPS = 10
MIDDLE = 5
# fp32 keeps 24 bits; a logit is a sum of some hundred products, through four blocks.
LOGIT_LIMIT = 2e-5

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Seen:
    """What one rank saw of a cell."""

    curve: Curve
    """Loss and gradient norm of each step."""
    resumed: bool
    """Whether steps from the middle, done again from a state, were the same bit for bit."""
    logits: float
    """Largest difference of the exported files' logits, relative to the largest logit; -1 on all
    ranks but the first."""
    moved: float
    """The same between the trained model and its base: what an export of nothing would show."""


def curve(world: World, *, setup: Setup) -> Curve:
    """Loss and gradient norm of each step; nothing on the ranks that have no part in it."""
    if setup.engine == "single" and not world.is_first:
        return []
    built = build(world, setup)
    return train(world, built.engine, setup, range(STEPS), built.participant)


def run_cell(world: World, *, setup: Setup, folder: Path) -> Seen | None:
    """Train, resume and export; ``folder`` gets the exported weights.

    None on ranks that have no part in it.
    """
    if setup.engine == "single":
        if not world.is_first:
            return None
        world = replace(world, rank=0, size=1)
    built = build(world, setup)
    batch = make_batch(99, 0, packed=False)
    before = logits_of(built.engine, batch)
    points = train(world, built.engine, setup, range(MIDDLE), built.participant)
    state = copied(world, built)
    points += train(world, built.engine, setup, range(MIDDLE, STEPS), built.participant)
    again = build(world, setup)
    put_back(world, again, state)
    rest = train(world, again.engine, setup, range(MIDDLE, STEPS), again.participant)
    resumed = rest == points[MIDDLE:] and _same(built.engine, again.engine)
    trained = logits_of(built.engine, batch)
    tokenizer = load_tokenizer(ModelConfig(path=setup.model))
    Exporter(built.engine, built.method, built.held, built.frozen, tokenizer, world).export(folder)
    logits = moved = -1.0
    if world.is_first:
        loaded = load_exported(world, built, setup, folder)
        scale = float(trained.abs().max())
        logits = float((plain_logits(loaded, batch) - trained).abs().max()) / scale
        moved = float((before - trained).abs().max()) / scale
    world.barrier()
    return Seen(points, resumed, logits, moved)


def logits_of(engine: Engine, batch: Batch) -> torch.Tensor:
    """Of the tokens of a batch; collective."""
    with evaluating(engine.model), engine.compute():
        output = engine.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            **{NUM_DOCUMENTS: batch.num_documents},
        )
    return _of_tokens(output.logits, batch)


def plain_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Of the tokens of a batch, by a model that knows nothing of dtune."""
    with torch.no_grad():
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return _of_tokens(output.logits, batch)


def _of_tokens(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    assert batch.attention_mask is not None
    # peft gives the logits of its virtual tokens too, before those of the tokens.
    return logits.float()[:, -batch.attention_mask.shape[1] :][batch.attention_mask.bool()]


def _same(one: Engine, other: Engine) -> bool:
    """Whether two engines hold the same weights; collective."""
    pairs = zip(one.full_tensors(), other.full_tensors(), strict=True)
    # All of them, because reading is collective.
    equal = [a is None or b is None or torch.equal(a, b) for (_, a), (_, b) in pairs]
    return all(equal)
