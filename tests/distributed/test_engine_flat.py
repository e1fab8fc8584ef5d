"""What is trained in one buffer: the numbers of separate tensors, with fewer operations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dtune.optim.schema.adamw import Flat
from tests.distributed.pool import Pool, RankError
from tests.distributed.test_engine_curves import CURVE, equal
from tests.distributed.training import Setup, config_folder

ALWAYS, NEVER = ((("flat", flat),) for flat in (Flat.always, Flat.never))
CASES = "tests.distributed.flat_cases:"
RESUME = "tests.distributed.training:resume"
ENGINES = ("single", "ddp")


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """A short run of a small model with adapters."""
    folder = config_folder(tmp_path_factory.mktemp("llama"))
    return Setup(
        str(folder),
        peft="lora",
        steps=6,
        micros=4,
        packed=True,
        random_weights=True,
        optim_options=NEVER,
    )


@pytest.mark.parametrize("peft", ["lora", "lora_plus", "bitfit"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_curve_is_that_of_separate_tensors(
    two_ranks: Pool, setup: Setup, engine: str, peft: str
) -> None:
    chosen = replace(setup, engine=engine, peft=peft)
    expected = two_ranks.run(CURVE, setup=chosen)[0]
    found = two_ranks.run(CURVE, setup=replace(chosen, optim_options=ALWAYS))[0]
    assert equal(found, expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("engine", ENGINES)
def test_in_low_precision_it_stays_as_near_as_that_rounds(
    two_ranks: Pool, setup: Setup, engine: str, precision: str
) -> None:
    """A last bit of fp32 may be one of bf16 or fp16 after the cast: 2^-8 or 2^-11."""
    chosen = replace(setup, engine=engine, precision=precision)
    expected = two_ranks.run(CURVE, setup=chosen)[0]
    found = two_ranks.run(CURVE, setup=replace(chosen, optim_options=ALWAYS))[0]
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for point, other in zip(found, expected, strict=True):
        assert point == pytest.approx(other, rel=2**-8)
    without = two_ranks.run(CURVE, setup=replace(chosen, lr=chosen.lr / 2))[0]
    assert without[-1] != pytest.approx(expected[-1], rel=2**-8)


def test_all_of_a_model_can_be_in_one_buffer_in_one_process(two_ranks: Pool, setup: Setup) -> None:
    whole = replace(setup, peft="full")
    found = two_ranks.run(CURVE, setup=replace(whole, optim_options=ALWAYS))[0]
    assert equal(found, two_ranks.run(CURVE, setup=whole)[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    two_ranks: Pool, setup: Setup, engine: str
) -> None:
    chosen = replace(setup, engine=engine, precision="bf16", optim_options=ALWAYS)
    for answer in two_ranks.run(RESUME, setup=chosen, at=3):
        assert answer["resumed"] == answer["uninterrupted"]
        assert answer["equal_weights"]


@pytest.mark.parametrize("options", [(ALWAYS, NEVER), (NEVER, ALWAYS)], ids=["from", "to"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_holds_the_same_with_and_without(
    two_ranks: Pool, setup: Setup, engine: str, options: tuple[Any, Any]
) -> None:
    first, then = (replace(setup, engine=engine, optim_options=own) for own in options)
    for answer in two_ranks.run(f"{CASES}moved", setup=first, other=then, at=3):
        assert answer["names"]
        assert answer["equal"]
        assert answer["scalars"]
        assert answer["shards"] == 3 * 28  # A and B of 14 linears: master and two moments
        assert equal(answer["went_on"], answer["stayed"])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_blocked_step_changes_nothing_and_the_host_does_not_wait(
    two_ranks: Pool, setup: Setup, engine: str
) -> None:
    for options in (ALWAYS, NEVER):
        chosen = replace(setup, engine=engine, optim_options=options)
        for answer in two_ranks.run(f"{CASES}blocked", setup=chosen):
            assert answer == {"unchanged": True, "not_counted": True, "waited": False}


def counted(pool: Pool, setup: Setup, engine: str, options: Any) -> dict[str, Any]:
    chosen = replace(setup, engine=engine, optim_options=options)
    answer: dict[str, Any] = pool.run(f"{CASES}operations", setup=chosen)[0]
    return answer


def test_ddp_adds_up_no_gradient_for_a_bucket(two_ranks: Pool, setup: Setup) -> None:
    """Of two micro batches a rank, the first one's gradients are kept where they come to be."""
    apart, flat = (counted(two_ranks, setup, "ddp", one) for one in (NEVER, ALWAYS))
    assert (apart["flat"], flat["flat"]) == (False, True)
    parameters = apart["parameters"]
    assert parameters == 28
    saved = apart["counts"]["aten::add_"] - flat["counts"]["aten::add_"]
    # And the optimizer's count of steps is one operation more.
    assert saved == parameters - 1
    assert flat["counts"]["aten::cat"] - apart["counts"].get("aten::cat", 0) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_one_update_serves_a_whole_group(two_ranks: Pool, setup: Setup, engine: str) -> None:
    plus = replace(setup, peft="lora_plus")
    for chosen, groups in ((setup, 1), (plus, 2)):
        flat = counted(two_ranks, chosen, engine, ALWAYS)
        assert flat["groups"] == flat["counts"]["dtune::adamw_flat_"] == groups
        assert "aten::_fused_adamw_" not in flat["counts"]
        apart = counted(two_ranks, chosen, engine, NEVER)
        assert "dtune::adamw_flat_" not in apart["counts"]


@pytest.mark.parametrize(
    ("engine", "options"),
    [("fsdp", ()), ("zero2", ()), ("ddp", (("one_bucket_mib", 0),))],
    ids=["fsdp", "zero2", "ddp"],
)
def test_pieces_are_refused_with_the_key_to_turn(
    two_ranks: Pool, setup: Setup, engine: str, options: tuple[tuple[str, Any], ...]
) -> None:
    chosen = replace(setup, engine=engine, engine_options=options, optim_options=ALWAYS)
    with pytest.raises(RankError, match=r"optim\.flat=always: .*set optim\.flat=auto"):
        two_ranks.run(CURVE, setup=chosen)
