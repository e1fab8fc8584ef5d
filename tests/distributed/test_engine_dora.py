"""DoRA reads the weight of the linear that it wraps: under ZeRO-3 that is gathered and freed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.distributed.pool import Pool
from tests.distributed.test_engine_curves import Curve, equal, reference_of
from tests.distributed.training import Setup, config_folder

LIVE = "tests.distributed.test_engine_kernels:live_curve"


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = config_folder(tmp_path_factory.mktemp("llama"))
    return Setup(str(folder), peft="dora", micros=2, steps=4, random_weights=True)


@pytest.fixture(scope="module")
def references() -> dict[Setup, Curve]:
    """Curves of one process, by setup."""
    return {}


@pytest.mark.parametrize(
    ("quant", "kernels", "recompute"),
    [
        ("none", False, "none"),
        ("none", True, "full"),
        ("nf4", False, "full"),
        ("nf4", True, "none"),
    ],
)
def test_zero3_gathers_what_dora_reads_and_frees_it(
    two_ranks: Pool,
    setup: Setup,
    references: dict[Setup, Curve],
    quant: str,
    kernels: bool,
    recompute: str,
) -> None:
    alone = replace(setup, quant=quant)
    sharded = replace(alone, engine="zero3", kernels=kernels, recompute=recompute)
    curve, live = two_ranks.run(LIVE, setup=sharded)[0]
    assert equal(curve, reference_of(two_ranks, alone, references))
    assert set(live) == {0}


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_zero3_gathers_what_dora_reads_for_dropped_inputs(
    two_ranks: Pool, setup: Setup, quant: str
) -> None:
    dropping = replace(setup, engine="zero3", quant=quant, peft_options=(("dropout", 0.2),))
    _, live = two_ranks.run(LIVE, setup=dropping)[0]
    assert set(live) == {0}


def test_zero3_gathers_the_bytes_that_patched_lora_reads(
    two_ranks: Pool, setup: Setup, references: dict[Setup, Curve]
) -> None:
    alone = replace(setup, peft="lora", quant="nf4")
    curve, live = two_ranks.run(LIVE, setup=replace(alone, engine="zero3", kernels=True))[0]
    assert equal(curve, reference_of(two_ranks, alone, references))
    assert set(live) == {0}
