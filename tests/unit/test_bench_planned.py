"""What ``dtune plan`` says of a case, against what a step of it holds; on a CPU."""

from __future__ import annotations

import gc

import pytest

from dtune.bench.measure import measure_case
from dtune.bench.memory import count_tensors
from dtune.bench.schema import BenchConfig
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.runtime.world import World

QUICK = BenchConfig(warm_up=1, steps=2, repeats=1, ceiling_seconds=0, plots=False)
WITHIN = 0.05
"""Gradients of all weights, held or not while activations are, are a tenth of such a step."""


@pytest.mark.parametrize("micros", [1, 2], ids=["one micro batch", "accumulated"])
@pytest.mark.parametrize(
    "method",
    [
        ["peft=full"],
        ["peft=full", "train.recompute=full"],
        ["peft=qlora", "optim.lr=1e-3", "precision=bf16"],
    ],
    ids=" ".join,
)
def test_the_plan_is_near_what_a_step_holds(world: World, method: list[str], micros: int) -> None:
    """Gradients are there from the first micro batch on, or come while activations go."""
    rows = 2
    run = load_frozen(
        compose_overrides(
            "train",
            [
                *("run_dir=/none", "data.max_length=192", f"train.micro_batch_size={rows}"),
                *(f"train.global_batch_size={rows * micros}", *method),
            ],
        )
    )
    gc.collect()
    others = count_tensors(lambda: None)
    one = measure_case(run, QUICK, world).measured
    assert one is not None
    assert one.planned_bytes is not None
    assert one.counted_bytes is not None
    assert abs(one.planned_bytes / (one.counted_bytes - others) - 1) < WITHIN
