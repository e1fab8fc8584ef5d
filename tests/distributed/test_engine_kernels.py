"""A patched model trains as the plain one does, under every engine."""

from __future__ import annotations

from dataclasses import replace

import pytest

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


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("engine", ["single", "fsdp", "zero3"])
def test_recomputation_of_patched_blocks_changes_nothing(
    two_ranks: Pool, setup: Setup, engine: str, recompute: str
) -> None:
    if (engine, recompute) == ("zero3", "selective"):
        return  # refused, with or without kernels
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
