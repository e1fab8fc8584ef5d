"""Virtual tokens train under every engine as in one process, over every base."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dtune.parallel.deepspeed import DeepSpeedEngine
from dtune.peft.schema.p_tuning import Encoder
from dtune.runtime.world import World
from tests.distributed import training
from tests.distributed.pool import Pool
from tests.distributed.test_engine_curves import (
    ENGINES,
    Curve,
    equal,
    reference_of,
    residuals,
)
from tests.distributed.training import Setup, config_folder

STRICT_CURVE = "tests.distributed.test_methods_virtual:curve_with_nothing_left_whole"
METHODS: dict[str, tuple[str, tuple[tuple[str, Any], ...]]] = {
    "prompt": ("prompt", (("num_virtual_tokens", 5),)),
    "mlp": ("p_tuning", (("num_virtual_tokens", 5),)),
    "lstm": ("p_tuning", (("num_virtual_tokens", 5), ("encoder", Encoder.lstm), ("hidden", 16))),
    "prefix": ("prefix", (("num_virtual_tokens", 5),)),
    "projected": ("prefix", (("num_virtual_tokens", 5), ("projection", True))),
}


def curve_with_nothing_left_whole(world: World, *, setup: Setup) -> Curve:
    """A curve under ZeRO-3 that keeps no small parameter whole on every rank."""
    with pytest.MonkeyPatch.context() as patch:
        whole = DeepSpeedEngine._settings

        def settings(self: DeepSpeedEngine, model: Any) -> dict[str, Any]:
            found = whole(self, model)
            if self._config.stage == 3:
                found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
            return found

        patch.setattr(DeepSpeedEngine, "_settings", settings)
        return training.curve(world, setup=setup)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a small architecture."""
    return str(config_folder(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def references() -> dict[Setup, Curve]:
    """Curves of one process, by setup; filled as tests ask."""
    return {}


def setup_of(model: str, method: str, engine: str, **options: Any) -> Setup:
    peft, settings = METHODS[method]
    return Setup(
        model,
        engine=engine,
        peft=peft,
        peft_options=settings,
        steps=10,
        random_weights=True,
        **options,
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ENGINES)
def test_curve_equals_single(
    two_ranks: Pool, model: str, references: dict[Setup, Curve], engine: str, method: str
) -> None:
    # Packed and padded rows take turns: five engines and five methods see both.
    packed = (ENGINES.index(engine) + list(METHODS).index(method)) % 2 == 0
    setup = setup_of(model, method, engine, packed=packed)
    first, second = two_ranks.run(STRICT_CURVE, setup=setup)
    expected = reference_of(two_ranks, setup, references)
    assert first == second
    assert equal(first, expected), max(map(abs, residuals(first, expected)))
    # It would be equal as well if nothing were trained.
    assert len({loss for loss, _ in first}) == len(first)
    assert all(norm > 0 for _, norm in first)


@pytest.mark.parametrize(
    ("engine", "recompute"), [("single", "selective"), ("fsdp", "selective"), ("zero3", "full")]
)
@pytest.mark.parametrize("method", ["prompt", "projected"])
def test_recomputation_changes_nothing(
    two_ranks: Pool,
    model: str,
    references: dict[Setup, Curve],
    engine: str,
    recompute: str,
    method: str,
) -> None:
    """Blocks computed again get the same prefix, which transformers would take from them."""
    setup = replace(setup_of(model, method, engine, recompute=recompute, packed=True), steps=3)
    curve = two_ranks.run(STRICT_CURVE, setup=setup)[0]
    plain = reference_of(two_ranks, replace(setup, recompute="none"), references)
    assert equal(curve, plain)
    if engine == "single":
        assert curve == plain


@pytest.mark.parametrize(
    ("method", "quant", "engine"),
    [("prompt", "nf4", "fsdp"), ("lstm", "int8", "zero3"), ("projected", "nf4", "zero3")],
)
def test_a_quantised_base_changes_nothing_of_it(
    two_ranks: Pool,
    model: str,
    references: dict[Setup, Curve],
    method: str,
    quant: str,
    engine: str,
) -> None:
    setup = setup_of(model, method, engine, quant=quant, packed=True)
    curve = two_ranks.run(STRICT_CURVE, setup=setup)[0]
    assert equal(curve, reference_of(two_ranks, setup, references))
    plain = reference_of(two_ranks, replace(setup, quant="none"), references)
    assert not equal(curve, plain), "the base was not quantised"


@pytest.mark.parametrize("method", ["lstm", "prefix"])
@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_half_precision_follows_fp32(
    two_ranks: Pool, model: str, references: dict[Setup, Curve], engine: str, method: str
) -> None:
    """bf16 keeps 8 bits: 2^-8 a rounding, and a loss is the mean of many."""
    setup = setup_of(model, method, engine, precision="bf16", packed=True)
    curve = two_ranks.run(STRICT_CURVE, setup=setup)[0]
    exact = reference_of(two_ranks, replace(setup, precision="fp32"), references)
    for (loss, _), (expected, _) in zip(curve, exact, strict=True):
        assert abs(loss - expected) <= 2**-6 * expected
    assert curve != exact
