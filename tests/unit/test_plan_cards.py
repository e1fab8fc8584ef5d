"""The table of cards, and rates that a user gives."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dtune.config.planning import PlanSettings
from dtune.errors import ConfigError
from dtune.measure.cards import CARDS, card_of_device
from dtune.plan.cards import choose_card, find_card
from dtune.plan.report import card_rows

RATES = {"tflops": 400.0, "memory_gb": 64.0, "bandwidth_tb": 1.6}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_has_rates_and_says_where_they_are_from(card) -> None:
    assert find_card(card.name) is card
    assert find_card(card.name.upper()) is card
    assert "data sheet" in card.source or "whitepaper" in card.source
    assert card.half_flops > card.single_flops
    assert card.fp8_flops is None or card.fp8_flops > card.half_flops
    assert 1e10 < card.memory < 1e12
    assert card.bandwidth > card.link > card.network


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100_40gb"),
        ("NVIDIA A100 80GB PCIe", "a100_pcie"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "4090"),
    ],
)
def test_a_device_is_the_card_of_its_name(device: str, name: str) -> None:
    card = card_of_device(device)
    assert card is not None
    assert card.name == name


@pytest.mark.parametrize(
    "device",
    [
        "Some Other GPU",
        "NVIDIA H20",
        "NVIDIA GH200 480GB",
        "NVIDIA H100 NVL",
        "NVIDIA L40",
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
    ],
)
def test_a_device_of_another_name_is_no_card(device: str) -> None:
    assert card_of_device(device) is None


def test_an_unknown_card_says_how_its_rates_are_given() -> None:
    with pytest.raises(ConfigError, match=r"card=h300 is not in the table.*card=h200") as error:
        choose_card(PlanSettings(card="h300"), 1)
    assert all(f"{key}=" in str(error.value) for key in (*RATES, "link_gb", "network_gb"))


def test_an_unknown_card_with_its_rates_is_taken_as_given() -> None:
    card = choose_card(PlanSettings(card="h300", **RATES), 1)
    assert card is not None
    assert (card.name, card.source) == ("h300", "as given")
    assert (card.half_flops, card.memory, card.bandwidth) == (400e12, 64e9, 1.6e12)


def test_an_unknown_card_needs_links_where_there_are_several() -> None:
    with pytest.raises(ConfigError, match="link_gb, network_gb are missing"):
        choose_card(PlanSettings(card="h300", **RATES), 2)
    card = choose_card(PlanSettings(card="h300", **RATES, link_gb=100, network_gb=10), 2)
    assert card is not None
    assert (card.link, card.network) == (100e9, 10e9)


def test_a_rate_that_is_given_takes_the_place_of_the_tables() -> None:
    card = choose_card(PlanSettings(card="h200", tflops=790), 1)
    assert card is not None
    assert card.half_flops == 790e12
    assert card.bandwidth == find_card("h200").bandwidth
    assert card.source.endswith("as given: half_flops")


def test_no_card_is_predicted_for_where_none_is() -> None:
    assert choose_card(PlanSettings(card="none"), 1) is None
    assert choose_card(PlanSettings(), 1) is None


@pytest.mark.parametrize("card", ["auto", "none"])
def test_a_rate_of_no_card_is_refused(card: str) -> None:
    with pytest.raises(ConfigError, match=r"tflops is a rate of a card.*card=NAME"):
        choose_card(PlanSettings(card=card, tflops=100), 1)


def test_this_machines_card_has_the_memory_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    be_a_machine_with("NVIDIA H200", monkeypatch)
    card = choose_card(PlanSettings(), 1)
    assert card == replace(find_card("h200"), memory=123e9)


def test_this_machines_unknown_card_says_so_and_takes_rates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    be_a_machine_with("Some Other GPU", monkeypatch)
    assert choose_card(PlanSettings(), 1) is None
    told = dict(card_rows(None))["card"]
    assert told.startswith("Some Other GPU, of this machine, is not in the table")
    assert "tflops=" in told
    with pytest.raises(ConfigError, match=r"Some Other GPU is not .* bandwidth_tb are missing"):
        choose_card(PlanSettings(tflops=400), 1)
    card = choose_card(PlanSettings(tflops=400, bandwidth_tb=1.6), 1)
    assert card is not None
    assert (card.name, card.half_flops, card.memory) == ("Some Other GPU", 400e12, 123e9)


def be_a_machine_with(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU of 123 GB, which CUDA calls so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    properties = SimpleNamespace(total_memory=123e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


@pytest.mark.parametrize(
    "wrong", [{"gpus": -1}, {"gpus_per_node": 0}, {"tflops": -1.0}, {"card": ""}]
)
def test_wrong_settings_are_refused_by_their_key(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}="):
        PlanSettings(**wrong)
