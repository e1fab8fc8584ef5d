"""Adapters, and parts of the base, train and resume under engines that shard parameters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dtune.peft.schema.adapter import Kind
from tests.distributed.pool import Pool
from tests.distributed.test_engine_curves import CURVE, Curve, equal, reference_of, residuals
from tests.distributed.training import Setup, config_folder

RESUME = "tests.distributed.training:resume"
# Each kind, and each engine that gathers or casts parameters, at least once.
CELLS = [("fsdp", Kind.houlsby), ("zero2", Kind.pfeiffer), ("zero3", Kind.parallel)]


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """Adapters on a small model, packed, with accumulation."""
    folder = config_folder(tmp_path_factory.mktemp("llama"))
    return Setup(
        str(folder), peft="adapter", steps=10, micros=4, packed=True, random_weights=True, lr=1e-2
    )


@pytest.fixture(scope="module")
def references() -> dict[Setup, Curve]:
    """Curves of one process."""
    return {}


@pytest.mark.parametrize(("engine", "kind"), CELLS, ids=lambda value: str(value))
def test_curve_equals_single(
    two_ranks: Pool, setup: Setup, references: dict[Setup, Curve], engine: str, kind: Kind
) -> None:
    chosen = replace(setup, engine=engine, peft_options=(("kind", kind),))
    first, second = two_ranks.run(CURVE, setup=chosen)
    expected = reference_of(two_ranks, chosen, references)
    assert first == second
    assert equal(first, expected), max(map(abs, residuals(first, expected)))
    losses = [loss for loss, _ in expected]
    assert min(losses) < losses[0] * 0.99, "the adapters learnt nothing"


@pytest.mark.parametrize("kind", [Kind.houlsby, Kind.parallel], ids=lambda kind: kind.value)
def test_zero3_gathers_adapters_of_any_size_and_frees_them(
    two_ranks: Pool, setup: Setup, references: dict[Setup, Curve], kind: Kind
) -> None:
    """With kernels, and with blocks that are computed again."""
    chosen = replace(setup, peft_options=(("kind", kind),), steps=4)
    sharded = replace(chosen, engine="zero3", recompute="full", kernels=True)
    case = "tests.distributed.test_engine_kernels:live_curve"
    curve, live = two_ranks.run(case, setup=sharded)[0]
    assert equal(curve, reference_of(two_ranks, chosen, references))
    assert set(live) == {0}


@pytest.mark.parametrize(
    ("engine", "peft", "options"),
    [
        ("fsdp", "adapter", {"kind": Kind.houlsby}),
        ("zero3", "freeze", {"last_blocks": 1, "final_norm": True}),
        ("zero2", "bitfit", {}),
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(
    two_ranks: Pool, setup: Setup, engine: str, peft: str, options: dict[str, Any]
) -> None:
    chosen = replace(
        setup, engine=engine, peft=peft, peft_options=tuple(options.items()), precision="bf16"
    )
    for answer in two_ranks.run(RESUME, setup=replace(chosen, steps=5), at=2):
        assert answer["resumed"] == answer["uninterrupted"]
        assert answer["equal_weights"]
