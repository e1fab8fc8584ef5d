"""The peak of an optimizer step: planned, and counted on all tensors of a rank."""

from __future__ import annotations

import gc

from dtune.bench.memory import count_tensors
from dtune.bench.planned import plan_case
from dtune.bench.schema import BenchConfig
from dtune.bench.subject import build_subject, prepared_run
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.config.run import RunConfig
from dtune.runtime.world import World

BENCH = BenchConfig()


def settings(*more: str) -> RunConfig:
    """Those of a run of the embedded model with random weights: two micro batches of 8 x 64."""
    overrides = ["experiment=quickstart", "train.micro_batch_size=8", *more]
    return prepared_run(load_frozen(compose_overrides("train", overrides)), BENCH)


def peaks(world: World, *, run: RunConfig, other: RunConfig | None = None) -> tuple[int, int]:
    """Bytes that the third step is planned to take of this rank at most, and that it takes.

    ``other``: what is planned instead.
    """
    # Engines of DeepSpeed that a rank has had before may live as long as it does.
    before = count_tensors(lambda: None)
    planned = plan_case(other or run, BENCH, world).memory
    assert planned is not None
    subject = build_subject(run, BENCH, world)
    for _ in range(2):
        subject.step()
    gc.collect()
    return planned, count_tensors(subject.step) - before
