"""Methods from HF ``peft`` on two ranks: nothing whole under ZeRO-3, and bf16 everywhere."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from tests.distributed.pool import Pool
from tests.distributed.training import Setup

METHODS: dict[str, tuple[tuple[str, object], ...]] = {
    "ia3": (),
    "vera": (("rank", 32),),
    "oft": (),
    "loha": (),
    "lokr": (),
    "layernorm": (),
}
HF = ("BOFT", "HRA", "RANDLORA")


def setup_of(case: str) -> Setup:
    options: tuple[tuple[str, object], ...] = METHODS.get(case, ())
    if case in HF:
        rank = () if case == "BOFT" else (("r", 8),)
        options = (("type", case), ("options", dict(rank)))
    name = "hf" if case in HF else case
    return Setup("dtune://tiny", peft=name, peft_options=options, steps=4)


@pytest.mark.parametrize("case", ["ia3", "vera", "loha", "HRA"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_zero3_gathers_what_layers_read_of_their_children(
    two_ranks: Pool, case: str, recompute: str
) -> None:
    """``peft`` keeps parameters in dicts that no forward calls, and HRA reads its base's weight."""
    single = setup_of(case)
    sharded = replace(
        single,
        engine="zero3",
        engine_options=(("param_persistence_threshold", 0),),
        recompute=recompute,
    )
    run = "tests.distributed.tuner_cases:partitioned_curve"
    expected = two_ranks.run(run, setup=single)[0].curve
    for seen in two_ranks.run(run, setup=sharded):
        assert seen.absent == seen.trained > 0
        # fp32 sums in another order, over four steps.
        assert seen.curve == [pytest.approx(point, rel=1e-4) for point in expected]


@pytest.mark.parametrize("case", [*METHODS, *HF])
def test_bf16_computes_the_same_under_every_engine(two_ranks: Pool, case: str) -> None:
    run = "tests.distributed.training:curve"
    single = replace(setup_of(case), precision="bf16", steps=2)
    expected = two_ranks.run(run, setup=single)[0]
    for engine in ("ddp", "fsdp", "zero2", "zero3"):
        curve = two_ranks.run(run, setup=replace(single, engine=engine))[0]
        assert all(math.isfinite(value) for point in curve for value in point), engine
        # Before any step: bf16 keeps 8 bits, some ten roundings of a logit's size in a row,
        # of which a mean over tokens keeps a part.
        assert curve[0][0] == pytest.approx(expected[0][0], rel=10 * 2**-9), engine
