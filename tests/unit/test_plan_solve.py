"""Settings that are found fit by the plan, and the next ones do not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.config.run import RunConfig
from dtune.errors import ConfigError
from dtune.measure.cards import Card
from dtune.measure.memory import GIB
from dtune.plan.auto import Decision, decide
from dtune.plan.cards import find_card
from dtune.plan.run import Planner, plan_run
from dtune.plan.solve import find_cheapest, find_max_length, find_micro_batch

SETTINGS = ["precision=bf16", "data.max_length=128", "train.global_batch_size=16"]


def settings(*more: str) -> RunConfig:
    return load_frozen(compose_overrides("train", [*SETTINGS, *more]))


def card_of(gib: float) -> Card:
    return replace(find_card("h200"), memory=gib * GIB)


@pytest.mark.parametrize("more", [[], ["peft=full", "kernels=reference"], ["train.recompute=full"]])
def test_the_longest_sequence_fits_and_the_next_does_not(more: list[str]) -> None:
    run, card = settings(*more), card_of(4)
    found = find_max_length(Planner(run, 1, card))
    assert found.size > 128

    def high(length: int) -> int:
        other = replace(run, data=replace(run.data, max_length=length))
        return plan_run(other, 1, card).memory.high

    assert high(found.size) <= card.memory < high(found.size + 1) == found.beyond


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    run, card = settings(), card_of(4)
    planner = Planner(run, 1, card)
    found = find_micro_batch(planner)
    assert found.size > 2
    high = [planner.memory(planner.with_rows(run, found.size + more)).high for more in (0, 1)]
    assert high[0] <= card.memory < high[1]


def test_nothing_fits_where_weights_alone_do_not() -> None:
    found = find_max_length(Planner(settings(), 1, card_of(0.01)))
    assert found.size == 0
    assert found.rows()[0].startswith("nothing fits: data.max_length=2 takes")


def test_a_search_needs_to_know_what_must_be_fitted() -> None:
    with pytest.raises(ConfigError, match="card=h200"):
        find_max_length(Planner(settings(), 1, None))


def test_the_cheapest_fits_and_nothing_that_fits_is_cheaper() -> None:
    run, card = settings("parallel=ddp"), card_of(2)
    choices = find_cheapest(Planner(run, 2, card))
    hours = [choice.gpu_seconds for choice in choices]
    assert hours == sorted(hours)
    assert all(choice.plan.memory.high <= card.memory for choice in choices)
    assert "train.recompute=none" in choices[0].settings
    assert {choice.settings[0] for choice in choices} > {"parallel=ddp", "parallel=fsdp"}
    # What it promises is what the plan of these settings says.
    best = load_frozen(compose_overrides("train", [*SETTINGS, *choices[0].settings]))
    assert plan_run(best, 2, card).memory.high == choices[0].plan.memory.high


def high_of(run: RunConfig, ranks: int) -> int:
    return plan_run(run, ranks, card_of(1)).memory.high


def decided(run: RunConfig, ranks: int, memory: float, card: Card | None = None) -> Decision:
    return decide(Planner(run, ranks, card), memory)


def test_recompute_is_the_least_that_fits() -> None:
    sizes = {level: high_of(settings(f"train.recompute={level}"), 1) for level in LEVELS}
    assert sizes["none"] > sizes["selective"] > sizes["full"]
    for level, size in sizes.items():
        decision = decided(settings("train.recompute=auto"), 1, size, card_of(1))
        assert decision.run.train.recompute.value == level
        assert f"train.recompute={level}: " in decision.reasons[-1]
        assert decision.reasons[-1].endswith(", fits")


LEVELS = ("none", "selective", "full")


def test_adapters_are_replicated_where_the_base_fits_and_sharded_where_not() -> None:
    large = ("model=llama3_8b", "train.recompute=full")
    asked = settings(*large, "parallel=auto")
    replicas = high_of(settings(*large, "parallel=ddp"), 8)
    sharded = high_of(settings(*large, "parallel=fsdp"), 8)
    assert sharded < replicas
    for memory, engine in ((replicas, "ddp"), (replicas - 1, "fsdp"), (sharded, "fsdp")):
        decision = decided(asked, 8, memory, card_of(1))
        assert decision.run.parallel.name == engine
        assert f"parallel={engine}: " in decision.reasons[-1]
    assert decided(asked, 1, replicas, card_of(1)).run.parallel.name == "single"


def test_what_cannot_fit_is_refused_with_what_to_turn() -> None:
    asked = settings("parallel=auto", "train.recompute=auto")
    with pytest.raises(ConfigError, match=r"parallel=auto and train\.recompute=auto") as error:
        decided(asked, 2, 1e6)
    assert "data.max_length" in str(error.value)
    # By the low estimate it may, and so it is tried.
    least = plan_run(settings("parallel=fsdp", "train.recompute=full"), 2, None).memory
    decision = decided(asked, 2, least.low)
    assert decision.run.parallel.name == "fsdp"
    assert "tried as it is" in decision.reasons[-1]


def test_auto_keeps_to_what_is_legal() -> None:
    asked = settings("parallel=zero3", "train.recompute=auto")
    decision = decided(asked, 2, 1e6 * GIB)
    assert decision.run.train.recompute.value == "none"
    small = plan_run(settings("parallel=zero3", "train.recompute=none"), 2, None).memory.high - 1
    assert decided(asked, 2, small).run.train.recompute.value == "full"


def test_settings_that_ask_for_nothing_stay_as_they_are() -> None:
    run = settings()
    assert decided(run, 1, 0).run is run
