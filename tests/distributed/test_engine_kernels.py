"""A patched model trains as the plain one does, under every engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

from dtune.parallel.deepspeed import DeepSpeedEngine
from dtune.runtime.world import World
from dtune.types import Batch, LossParts
from tests.distributed import training
from tests.distributed.pool import Pool
from tests.distributed.test_engine_curves import CURVE, Curve, equal, reference_of, residuals
from tests.distributed.training import Setup, config_folder

ENGINES = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """LoRA on a small model, packed, with accumulation."""
    folder = config_folder(tmp_path_factory.mktemp("llama"))
    return Setup(str(folder), peft="lora", micros=4, packed=True, random_weights=True, kernels=True)


@pytest.fixture(scope="module")
def references() -> dict[Setup, Curve]:
    """Curves of one process without kernels."""
    return {}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("peft", ["lora", "full"])
def test_the_patched_curve_equals_the_plain_one(
    two_ranks: Pool, setup: Setup, references: dict[Setup, Curve], engine: str, peft: str
) -> None:
    patched = two_ranks.run(CURVE, setup=replace(setup, engine=engine, peft=peft))[0]
    plain = reference_of(two_ranks, replace(setup, kernels=False, peft=peft), references)
    assert equal(patched, plain), max(map(abs, residuals(patched, plain)))
    assert patched != plain, "the patches were not applied"


RECOMPUTING = [
    ("single", "selective"),
    ("single", "full"),
    ("fsdp", "selective"),
    ("fsdp", "full"),
    ("zero3", "full"),  # which refuses selective, with or without kernels
]


@pytest.mark.parametrize(("engine", "recompute"), RECOMPUTING)
def test_recomputation_of_patched_blocks_changes_nothing(
    two_ranks: Pool, setup: Setup, engine: str, recompute: str
) -> None:
    once = replace(setup, engine=engine, steps=4)
    again = two_ranks.run(CURVE, setup=replace(once, recompute=recompute))[0]
    assert equal(again, two_ranks.run(CURVE, setup=once)[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_patched_bf16_follows_fp32(
    two_ranks: Pool, setup: Setup, references: dict[Setup, Curve], engine: str
) -> None:
    """bf16 keeps 8 bits: 2^-8 a rounding, and a loss is the mean of many."""
    chosen = replace(setup, engine=engine, precision="bf16", steps=12, recompute="full")
    curve = two_ranks.run(CURVE, setup=chosen)[0]
    exact = replace(setup, steps=12, kernels=False)
    for (loss, _), (expected, _) in zip(
        curve, reference_of(two_ranks, exact, references), strict=True
    ):
        assert abs(loss - expected) <= 2**-6 * expected


def live_curve(world: World, *, setup: Setup) -> tuple[Curve, list[int]]:
    """A curve under ZeRO-3 that shards and frees parameters of any size at once.

    By default it keeps those of a small model whole. With the curve come the parameters that are
    whole, in all: at the start, after each forward, and after each step.
    """
    settings, loss = DeepSpeedEngine._settings, training.causal_loss
    live: list[int] = []

    def eager_settings(self: DeepSpeedEngine, model: nn.Module) -> dict[str, Any]:
        chosen = settings(self, model)
        names = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
        chosen["zero_optimization"] |= {f"stage3_{name}": 0 for name in names}
        return chosen

    def count() -> None:
        live.append(sum(p.ds_status.name == "AVAILABLE" for p in engine.module.parameters()))

    def counted_loss(model: nn.Module, batch: Batch) -> LossParts:
        parts = loss(model, batch)
        count()
        return parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepSpeedEngine, "_settings", eager_settings)
        patch.setattr(training, "causal_loss", counted_loss)
        engine = training.build_engine(world, setup)
        count()
        curve = []
        for step in range(setup.steps):
            curve += training.train(world, engine, setup, range(step, step + 1))
            count()
    return curve, live


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("peft", ["lora", "full"])
def test_zero3_gathers_what_fused_modules_read_and_frees_it(
    two_ranks: Pool, setup: Setup, references: dict[Setup, Curve], peft: str, recompute: str
) -> None:
    chosen = replace(setup, peft=peft, steps=4)
    sharded = replace(chosen, engine="zero3", recompute=recompute)
    case = "tests.distributed.test_engine_kernels:live_curve"
    curve, live = two_ranks.run(case, setup=sharded)[0]
    assert equal(curve, reference_of(two_ranks, replace(chosen, kernels=False), references))
    assert set(live) == {0}
