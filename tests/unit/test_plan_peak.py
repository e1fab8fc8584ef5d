"""The peak that is planned of a whole optimizer step is the peak of all tensors in a real one."""

from __future__ import annotations

import pytest

from dtune.peft.schema import PEFT
from dtune.runtime.world import World
from tests.distributed.peak_cases import peaks, settings

WITHIN = 0.05
ONE_MICRO = "train.global_batch_size=8"
"""Without accumulation gradients come while activations go."""
TWO_MICROS = "train.global_batch_size=16"
FEW_TOKENS = ("train.micro_batch_size=1", "train.global_batch_size=1")
"""The optimizer's step takes more than the passes."""


def assert_planned(world: World, *overrides: str, other: tuple[str, ...]) -> None:
    """Hold the plan of settings against a count, which that of ``other`` is nowhere near."""
    run = settings(*overrides)
    planned, counted = peaks(world, run=run)
    assert planned == pytest.approx(counted, rel=WITHIN)
    wrong = peaks(world, run=run, other=settings(*other))
    assert wrong[0] != pytest.approx(wrong[1], rel=WITHIN)


@pytest.mark.parametrize("passes", ["none", "full"])
@pytest.mark.parametrize("micros", [ONE_MICRO, TWO_MICROS])
@pytest.mark.parametrize("peft", ["full", "lora"])
def test_with_and_without_accumulation(world: World, peft: str, micros: str, passes: str) -> None:
    chosen = (f"peft={peft}", micros)
    wrong = "train.recompute=full" if passes == "none" else "train.recompute=none"
    assert_planned(world, *chosen, f"train.recompute={passes}", other=(*chosen, wrong))


@pytest.mark.parametrize("micros", [ONE_MICRO, TWO_MICROS])
@pytest.mark.parametrize("peft", ["full", "lora"])
def test_copies_of_weights_stay_until_backward_is_through(
    world: World, peft: str, micros: str
) -> None:
    chosen = (f"peft={peft}", micros, "train.recompute=full")
    few = (*chosen, *FEW_TOKENS, "precision=bf16")
    assert_planned(world, *few, other=(*few, "precision=fp32", "data.max_length=512"))


def test_gradients_that_come_as_activations_go_are_not_added_to_them(world: World) -> None:
    """A tenth of the peak: the plan with accumulation is rejected by the count without."""
    chosen = ("peft=full", "train.recompute=full", "train.micro_batch_size=1")
    one, two = (f"train.global_batch_size={micros}" for micros in (1, 2))
    run, accumulates = settings(*chosen, one), settings(*chosen, two)
    assert peaks(world, run=run)[0] < peaks(world, run=accumulates)[0]
    assert_planned(world, *chosen, one, other=(*chosen, two, "optim.flat=always"))


ALWAYS = ("adalora", "p_tuning", "prefix", "prompt", "vera")
"""Methods that hold more than adapters: embeddings of tokens, random matrices, importance."""


@pytest.mark.parametrize(
    "peft",
    [one if one in ALWAYS else pytest.param(one, marks=pytest.mark.slow) for one in PEFT.names()],
)
def test_every_method(world: World, peft: str) -> None:
    chosen = (f"peft={peft}", TWO_MICROS)
    assert_planned(world, *chosen, other=(*chosen, "train.recompute=full"))


@pytest.mark.parametrize("peft", ["full", "lora"])
def test_gradients_are_there_twice_while_they_are_put_into_one_buffer(
    world: World, peft: str
) -> None:
    few = (f"peft={peft}", *FEW_TOKENS, "data.max_length=16", "train.recompute=full")
    larger = (*few, "peft.rank=64") if peft == "lora" else few
    never = (*larger, "optim.flat=never")
    assert_planned(world, *larger, "optim.flat=always", other=never)


def test_sgd_copies_the_gradients_of_what_decays(world: World) -> None:
    few = ("peft=full", *FEW_TOKENS, "data.max_length=16", "optim=sgd")
    assert_planned(world, *few, "optim.weight_decay=0.1", other=(*few, "optim.weight_decay=0"))
