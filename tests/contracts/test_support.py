"""Which combinations hold is data, and the data are right."""

from __future__ import annotations

import itertools

import pytest

from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.config.run import RunConfig
from dtune.config.support import ILLEGAL, Illegal, check_run, choices, find_illegal, forbids, matrix
from dtune.errors import ConfigError
from dtune.parallel.schema import PARALLEL


def run_of(chosen: dict[str, str]) -> RunConfig:
    extra = ["data.format=text"] if chosen.get("objective") == "pretrain" else []
    overrides = [f"{group}={option}" for group, option in chosen.items()]
    return load_frozen(compose_overrides("train", [*overrides, *extra]))


def check(chosen: dict[str, str]) -> None:
    run = run_of(chosen)
    check_run(run, 1 if run.parallel.name == "single" else 2)


def cells_of(rule: Illegal) -> list[dict[str, str]]:
    groups = list(rule.options)
    return [
        dict(zip(groups, options, strict=True))
        for options in itertools.product(*(sorted(rule.options[group]) for group in groups))
    ]


@pytest.mark.parametrize("rule", ILLEGAL, ids=lambda rule: rule.instead)
def test_every_illegal_cell_is_refused_with_the_nearest_legal_one(rule: Illegal) -> None:
    for cell in cells_of(rule):
        with pytest.raises(ConfigError) as error:
            check(cell)
        assert rule.instead in str(error.value)
        assert all(f"{group}={option}" in str(error.value) for group, option in cell.items())


@pytest.mark.parametrize("rule", ILLEGAL, ids=lambda rule: rule.instead)
def test_what_a_rule_proposes_is_legal(rule: Illegal) -> None:
    for cell in cells_of(rule):
        for proposal in rule.instead.split(", or "):
            group, _, option = proposal.partition("=")
            chosen = {**cell, group: option}
            check(chosen)
            assert find_illegal(choices(run_of(chosen))) is None, proposal


def test_rules_name_groups_and_options_that_exist() -> None:
    known = {**matrix(), "parallel": PARALLEL.names()}
    for rule in ILLEGAL:
        for group, options in rule.options.items():
            assert options <= set(known[group])


def test_a_rule_forbids_only_its_own_cells() -> None:
    rule = Illegal({"peft": frozenset({"full"}), "quant": frozenset({"nf4"})}, "why", "peft=lora")
    assert forbids(rule, {"peft": "full", "quant": "nf4"})
    assert not forbids(rule, {"peft": "lora", "quant": "nf4"})
    assert find_illegal(choices(run_of({"optim": "adamw", "parallel": "fsdp"}))) is None


def test_a_type_of_peft_that_reads_the_base_is_refused_over_bytes() -> None:
    chosen = ["peft=hf", "peft.type=HRA"]
    check_run(load_frozen(compose_overrides("train", chosen)), 1)
    with pytest.raises(ConfigError, match=r"peft\.type=HRA with quant=nf4: .* use quant=none"):
        check_run(load_frozen(compose_overrides("train", [*chosen, "quant=nf4"])), 1)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex"])
def test_a_prefix_that_packed_documents_would_not_see_is_refused(attention: str) -> None:
    chosen = ["peft=prefix", f"model.attention={attention}"]
    check_run(load_frozen(compose_overrides("train", [*chosen, "data.packing=false"])), 1)
    with pytest.raises(ConfigError, match=r"peft=prefix .* use model\.attention=sdpa"):
        check_run(load_frozen(compose_overrides("train", chosen)), 1)


def test_a_text_is_not_cut_by_another_tokenizer() -> None:
    chosen = ["peft=prompt", "peft.init=text", "peft.init_text=Answer.", "model.tokenizer=other"]
    with pytest.raises(ConfigError, match=r"model\.tokenizer=other is another"):
        check_run(load_frozen(compose_overrides("train", chosen)), 1)
