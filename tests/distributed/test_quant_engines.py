"""Every engine trains adapters over a base of bytes as one process does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.distributed.pool import Pool, RankError
from tests.distributed.test_engine_curves import (
    CURVE,
    ENGINES,
    Curve,
    equal,
    reference_of,
    residuals,
)
from tests.distributed.training import Setup, config_folder

Options = tuple[tuple[str, Any], ...]
KINDS: dict[str, tuple[str, Options]] = {
    "nf4": ("nf4", ()),
    "nf4-single": ("nf4", (("double", False),)),
    "fp4": ("fp4", ()),
    "int8": ("int8", ()),
}
RESUME = "tests.distributed.training:resume"
SHARD_ALL = (("param_persistence_threshold", 0),)
"""ZeRO-3 would keep whole what is as small as all of this model is."""


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """Ten steps of LoRA."""
    folder = config_folder(tmp_path_factory.mktemp("llama"))
    return Setup(str(folder), peft="lora", quant="nf4", steps=10, packed=True, random_weights=True)


@pytest.fixture(scope="module")
def references() -> dict[Setup, Curve]:
    """Curves of one process, by setup."""
    return {}


def under(setup: Setup, engine: str, **changes: Any) -> Setup:
    options = SHARD_ALL if engine == "zero3" else ()
    return replace(setup, engine=engine, engine_options=options, **changes)


def reference(pool: Pool, setup: Setup, references: dict[Setup, Curve]) -> Curve:
    """The curve of one process, with the same settings besides the engine's."""
    return reference_of(pool, replace(setup, engine_options=()), references)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_curve_equals_single(
    two_ranks: Pool, setup: Setup, references: dict[Setup, Curve], engine: str, kind: str
) -> None:
    quant, options = KINDS[kind]
    chosen = under(setup, engine, quant=quant, quant_options=options)
    first, second = two_ranks.run(CURVE, setup=chosen)
    expected = reference(two_ranks, chosen, references)
    assert first == second
    assert equal(first, expected), max(map(abs, residuals(first, expected)))


def test_every_kind_is_a_model_of_its_own(
    two_ranks: Pool, setup: Setup, references: dict[Setup, Curve]
) -> None:
    """What the comparisons above would not let pass: the curve over another base."""
    curves = [
        reference(two_ranks, replace(setup, quant=quant, quant_options=options), references)
        for quant, options in [*KINDS.values(), ("none", ())]
    ]
    for index, curve in enumerate(curves):
        for other in curves[:index]:
            assert not equal(curve, other)


@pytest.mark.parametrize("engine", ["single", *ENGINES])
def test_bf16_follows_fp32(
    two_ranks: Pool, setup: Setup, references: dict[Setup, Curve], engine: str
) -> None:
    """As over a float base: 2^-8 a rounding. The bytes themselves are not rounded."""
    curve = two_ranks.run(CURVE, setup=under(setup, engine, precision="bf16"))[0]
    exact = reference(two_ranks, setup, references)
    for (loss, _), (expected, _) in zip(curve, exact, strict=True):
        assert abs(loss - expected) <= 2**-6 * expected
    assert curve != exact


@pytest.mark.parametrize(
    ("engine", "quant", "precision"),
    [
        *((engine, "nf4", "fp32") for engine in ENGINES),
        ("fsdp", "int8", "bf16"),
        ("zero3", "int8", "bf16"),
        ("zero3", "fp4", "fp32"),
    ],
)
def test_resumes_bit_for_bit_and_gathers_whole_adapters(
    two_ranks: Pool, setup: Setup, engine: str, quant: str, precision: str
) -> None:
    chosen = under(setup, engine, quant=quant, precision=precision, steps=6)
    first, second = two_ranks.run(RESUME, setup=chosen, at=3)
    assert first["resumed"] == first["uninterrupted"] == second["resumed"]
    assert first["equal_weights"]
    adapters = 2 * 7 * 2  # A and B of seven linears in each of two blocks
    assert first["tensors"] == adapters


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("engine", ["single", *ENGINES])
def test_recomputation_changes_nothing(
    two_ranks: Pool, setup: Setup, references: dict[Setup, Curve], engine: str, recompute: str
) -> None:
    chosen = under(setup, engine, recompute=recompute)
    if (engine, recompute) == ("zero3", "selective"):
        with pytest.raises(RankError, match=r"ConfigError: .*set train\.recompute=full"):
            two_ranks.run(CURVE, setup=chosen)
        return
    curve = two_ranks.run(CURVE, setup=chosen)[0]
    assert equal(curve, reference(two_ranks, replace(chosen, recompute="none"), references))


def test_compiled_blocks_change_nothing(
    two_ranks: Pool, setup: Setup, references: dict[Setup, Curve]
) -> None:
    chosen = under(setup, "fsdp", steps=4, compile_blocks=True)
    curve = two_ranks.run(CURVE, setup=chosen)[0]
    plain = replace(chosen, compile_blocks=False)
    assert equal(curve, reference(two_ranks, plain, references))


def test_a_base_on_one_rank_may_have_no_byte_of_a_scale(
    two_ranks: Pool, setup: Setup, references: dict[Setup, Curve]
) -> None:
    """A block as long as some weights: one scale of four bytes, cut between ranks."""
    options = (("double", False), ("block_size", 4096))
    chosen = under(setup, "fsdp", quant_options=options)
    curve = two_ranks.run(CURVE, setup=chosen)[0]
    assert equal(curve, reference(two_ranks, chosen, references))
