"""Options of engines, and what they refuse."""

from __future__ import annotations

import math
from dataclasses import replace

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


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp"])
def test_overflow_skips_the_step_and_lowers_the_scale(
    two_ranks: Pool, setup: Setup, engine: str
) -> None:
    """At an absurd scale every gradient overflows until halving has brought it down."""
    answer = two_ranks.run(FP16, setup=replace(setup, engine=engine, precision="fp16"))[0]
    assert answer["skipped"] == answer["overflows"] > 0
    assert answer["scale"] == answer["first_scale"] / 2 ** answer["skipped"]
    assert answer["optimizer_step"] == answer["schedule_position"] == 8 - answer["skipped"]


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_fp16_under_deepspeed_follows_single(two_ranks: Pool, setup: Setup, engine: str) -> None:
    """It says that a CPU has no fp16; torch has, so that its scaling can be seen to be right."""
    chosen = replace(setup, engine=engine, precision="fp16")
    with pytest.raises(RankError, match="precision=bf16"):
        two_ranks.run(CURVE, setup=chosen)
    answer = two_ranks.run(FP16, setup=chosen)[0]
    alone = two_ranks.run(FP16, setup=replace(chosen, engine="single"))[0]
    for key in ("skipped", "overflows", "scale", "optimizer_step", "schedule_position"):
        assert answer[key] == alone[key], key
    for point, expected in zip(answer["curve"], alone["curve"], strict=True):
        for one, other in zip(point, expected, strict=True):
            both_overflowed = not (math.isfinite(one) or math.isfinite(other))
            assert both_overflowed or abs(one - other) <= 2**-7 * other


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
