"""Options of engines, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.distributed.pool import Pool, RankError
from tests.distributed.test_engine_curves import CURVE, equal
from tests.distributed.training import Setup, config_folder

FP16 = "tests.distributed.training:fp16_curve"


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A short run of a small model."""
    folder = config_folder(tmp_path_factory.mktemp("llama"))
    return Setup(str(folder), steps=8, micros=4, packed=True, random_weights=True)


@pytest.mark.parametrize(
    ("engine", "options"),
    [
        ("ddp", (("bucket_mib", 1),)),
        ("fsdp", (("shard_size", 1),)),
        ("fsdp", (("shard_size", 2),)),
        ("fsdp", (("reshard_after_forward", False),)),
        ("fsdp", (("cpu_offload", True),)),
        ("zero1", (("reduce_bucket_size", 1000),)),
        ("zero2", (("cpu_offload", True),)),
        ("zero3", (("reduce_bucket_size", 10_000),)),
        ("zero3", (("param_persistence_threshold", 0),)),
    ],
    ids=str,
)
def test_options_change_no_number(
    two_ranks: Pool, setup: Setup, engine: str, options: tuple[tuple[str, object], ...]
) -> None:
    chosen = replace(setup, engine=engine, engine_options=options)
    assert equal(two_ranks.run(CURVE, setup=chosen)[0], two_ranks.run(CURVE, setup=setup)[0])


# At the first every gradient overflows until halving has brought it down, at the second none does.
ABSURD_SCALE, USUAL_SCALE = 2.0**24, 2.0**12


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp"])
def test_overflow_skips_the_step_and_lowers_the_scale(
    two_ranks: Pool, setup: Setup, engine: str
) -> None:
    chosen = replace(setup, engine=engine, precision="fp16")
    check_overflow(two_ranks.run(FP16, setup=chosen, first_scale=ABSURD_SCALE)[0], chosen.steps)


def check_overflow(answer: dict[str, Any], steps: int) -> None:
    assert steps > answer["skipped"] == answer["overflows"] > 0
    assert answer["scale"] == ABSURD_SCALE / 2 ** answer["skipped"]
    assert answer["optimizer_step"] == answer["schedule_position"] == steps - answer["skipped"]


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_fp16_under_deepspeed_follows_single(two_ranks: Pool, setup: Setup, engine: str) -> None:
    """It says that a CPU has no fp16; torch has, so that its scaling can be seen to be right."""
    chosen = replace(setup, engine=engine, precision="fp16")
    with pytest.raises(RankError, match="precision=bf16"):
        two_ranks.run(CURVE, setup=chosen)
    check_overflow(two_ranks.run(FP16, setup=chosen, first_scale=ABSURD_SCALE)[0], chosen.steps)
    answer = two_ranks.run(FP16, setup=chosen, first_scale=USUAL_SCALE)[0]
    alone = replace(chosen, engine="single")
    expected = two_ranks.run(FP16, setup=alone, first_scale=USUAL_SCALE)[0]
    for key in ("scale", "optimizer_step", "schedule_position"):
        assert answer[key] == expected[key], key
    assert answer["skipped"] == expected["skipped"] == 0
    for point, right in zip(answer["curve"], expected["curve"], strict=True):
        for one, other in zip(point, right, strict=True):
            assert abs(one - other) <= 2**-7 * other


def test_a_shard_size_that_does_not_divide_the_ranks_is_refused(
    two_ranks: Pool, setup: Setup
) -> None:
    chosen = replace(setup, engine="fsdp", engine_options=(("shard_size", 3),))
    with pytest.raises(RankError, match=r"ConfigError: parallel\.shard_size=3 does not divide"):
        two_ranks.run(CURVE, setup=chosen)


def test_compiled_blocks_under_zero3_are_refused(two_ranks: Pool, setup: Setup) -> None:
    chosen = replace(setup, engine="zero3", compile_blocks=True)
    with pytest.raises(RankError, match=r"ConfigError: train\.compile=true"):
        two_ranks.run(CURVE, setup=chosen)
