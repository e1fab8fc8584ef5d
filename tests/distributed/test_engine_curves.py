"""Every engine trains as one process does: loss and gradient norm of each step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.distributed.pool import Pool, RankError
from tests.distributed.training import Setup, config_folder

ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
CURVE = "tests.distributed.training:curve"
Curve = list[tuple[float, float]]

# fp32 has 24 bits: sums of some thousand terms in another order differ by a few 1e-7, which 20
# steps at this learning rate carry on. The claim is 1e-4 at every step.
LIMIT = 1e-4
# Rounding has no sign: its mean over 40 numbers stays well below its largest value.
DRIFT = LIMIT / 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a small architecture."""
    return str(config_folder(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def references() -> dict[Setup, Curve]:
    """Curves of one process, by setup; filled as tests ask."""
    return {}


def residuals(curve: Curve, reference: Curve) -> list[float]:
    """Signed relative difference of every loss and norm."""
    assert len(curve) == len(reference) > 0
    return [
        (one - other) / other
        for point, expected in zip(curve, reference, strict=True)
        for one, other in zip(point, expected, strict=True)
    ]


def equal(curve: Curve, reference: Curve) -> bool:
    """Whether curves agree at every step, and on the whole to one side no more than noise."""
    signed = residuals(curve, reference)
    return max(map(abs, signed)) <= LIMIT and abs(sum(signed) / len(signed)) <= DRIFT


def reference_of(pool: Pool, setup: Setup, references: dict[Setup, Curve]) -> Curve:
    """The curve of ``single`` for the same rows."""
    alone = replace(setup, engine="single", grad_scale_error=1.0)
    if alone not in references:
        references[alone] = pool.run(CURVE, setup=alone)[0]
    return references[alone]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("micros", [2, 8], ids=["accumulation1", "accumulation4"])
@pytest.mark.parametrize("peft", ["full", "lora"])
@pytest.mark.parametrize("engine", ENGINES)
def test_curve_equals_single(
    two_ranks: Pool,
    model: str,
    references: dict[Setup, Curve],
    engine: str,
    peft: str,
    micros: int,
    packed: bool,
) -> None:
    setup = Setup(
        model, engine=engine, peft=peft, micros=micros, packed=packed, random_weights=True
    )
    first, second = two_ranks.run(CURVE, setup=setup)
    expected = reference_of(two_ranks, setup, references)
    assert first == second
    assert equal(first, expected), max(map(abs, residuals(first, expected)))
    norms = [norm for _, norm in expected]
    assert max(norms) > setup.max_norm, "nothing was clipped"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_wrong_scale_is_noticed(
    two_ranks: Pool, model: str, references: dict[Setup, Curve], engine: str
) -> None:
    """Half the scale: what forgetting the number of ranks does. SGD shows it in the losses too."""
    right = Setup(model, engine=engine, random_weights=True, optim="sgd", lr=0.02, max_norm=0.0)
    expected = reference_of(two_ranks, right, references)
    assert equal(two_ranks.run(CURVE, setup=right)[0], expected)
    wrong = two_ranks.run(CURVE, setup=replace(right, grad_scale_error=0.5))[0]
    assert not equal(wrong, expected)
    losses = [
        abs(one - other) / other for (one, _), (other, _) in zip(wrong, expected, strict=True)
    ]
    assert max(losses) > 100 * LIMIT


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_clipped_once_and_to_the_norm_asked_for(
    two_ranks: Pool, model: str, references: dict[Setup, Curve], engine: str
) -> None:
    """Under SGD the bound scales every step, so that another bound is another curve."""
    setup = Setup(model, engine=engine, random_weights=True, optim="sgd", lr=0.1, max_norm=0.5)
    clipped = two_ranks.run(CURVE, setup=setup)[0]
    assert equal(clipped, reference_of(two_ranks, setup, references))
    other = reference_of(two_ranks, replace(setup, max_norm=0.25), references)
    assert not equal(clipped, other)


@pytest.mark.parametrize("engine", ["single", *ENGINES])
def test_bf16_follows_fp32(
    two_ranks: Pool, model: str, references: dict[Setup, Curve], engine: str
) -> None:
    """bf16 keeps 8 bits: 2^-8 a rounding, and a loss is the mean of many. It also still learns."""
    setup = Setup(
        model,
        engine=engine,
        precision="bf16",
        steps=12,
        micros=4,
        packed=True,
        random_weights=True,
        recompute="full",
    )
    curve = two_ranks.run(CURVE, setup=setup)[0]
    exact = reference_of(two_ranks, replace(setup, precision="fp32", recompute="none"), references)
    for (loss, _), (expected, _) in zip(curve, exact, strict=True):
        assert abs(loss - expected) <= 2**-6 * expected
    assert curve != exact
    assert curve[-1][0] < curve[0][0]


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("engine", ["single", *ENGINES])
def test_recomputation_changes_nothing(
    two_ranks: Pool, model: str, references: dict[Setup, Curve], engine: str, recompute: str
) -> None:
    setup = Setup(
        model, engine=engine, peft="lora", steps=4, random_weights=True, recompute=recompute
    )
    if (engine, recompute) == ("zero3", "selective"):
        with pytest.raises(RankError, match=r"ConfigError: .*set train\.recompute=full"):
            two_ranks.run(CURVE, setup=setup)
        return
    curve = two_ranks.run(CURVE, setup=setup)[0]
    plain = reference_of(two_ranks, replace(setup, recompute="none"), references)
    assert equal(curve, plain)


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp"])
def test_fp16_follows_fp32(
    two_ranks: Pool, model: str, references: dict[Setup, Curve], engine: str
) -> None:
    """fp16 keeps 11 bits; norms are of the gradients without the loss scale."""
    setup = Setup(
        model,
        engine=engine,
        precision="fp16",
        steps=6,
        micros=4,
        packed=True,
        random_weights=True,
    )
    curve = two_ranks.run(CURVE, setup=setup)[0]
    exact = reference_of(two_ranks, replace(setup, precision="fp32"), references)
    for point, expected in zip(curve, exact, strict=True):
        for one, other in zip(point, expected, strict=True):
            assert abs(one - other) <= 2**-8 * other
