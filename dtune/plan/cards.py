"""The card that is planned for: of the table, of this machine, or of rates that the user gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dtune.config.planning import PlanSettings
from dtune.config.suggest import did_you_mean, near_options
from dtune.errors import ConfigError
from dtune.measure.cards import CARDS, GB, TB, TERA, Card, card_of_device

__all__ = ["Card", "choose_card", "device_here", "find_card", "limit_of"]

_NEEDED = ("tflops", "memory_gb", "bandwidth_tb")
_LINKS = ("link_gb", "network_gb")
_GIVEN = "as given"
HOW = (
    "the rates of its data sheet: tflops=(dense bf16 TFLOP/s) memory_gb=(GB) bandwidth_tb=(TB/s), "
    "and for several cards link_gb=(GB/s to a card of the node) network_gb=(GB/s to other nodes)"
)


def find_card(name: str) -> Card:
    """The card of the table by its name; ConfigError where it is not there."""
    wanted = name.lower().replace("-", "_")
    for card in CARDS:
        if card.name == wanted:
            return card
    names = [card.name for card in CARDS]
    raise ConfigError(
        f"card={name} is not in the table of cards ({', '.join(names)})"
        f"{did_you_mean([f'card={near}' for near in near_options(wanted, names)])}; give {HOW}"
    )


def device_here() -> str:
    """What CUDA calls the GPU of this machine; empty where it has none."""
    import torch  # only now, because a wrong name is answered before it is imported

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _memory_here() -> float:
    import torch  # see device_here

    return float(torch.cuda.get_device_properties(0).total_memory)


def limit_of(card: Card | None) -> float:
    """Bytes that a rank may take; ConfigError where nothing says how many."""
    if card is None:
        raise ConfigError(
            "find= and auto look for what fits a card, and none is named and none is here; name "
            "it: card=h200 (docs/plan.md has the others)"
        )
    return card.memory


def choose_card(settings: PlanSettings, ranks: int) -> Card | None:
    """The card that the settings of a plan name; None where there is none to be predicted for.

    Raises:
        ConfigError: It is not in the table, and not every rate of it is given.
    """
    given = [key for key in (*_NEEDED, *_LINKS) if getattr(settings, key)]
    if settings.card == "none":
        card = None
    elif settings.card == "auto":
        card = _card_of_this_machine(ranks, given)
    else:
        card = _named(settings.card, ranks, given)
    if card is None and given:
        raise ConfigError(
            f"{given[0]} is a rate of a card, and none is named and none is here; name the card: "
            "card=NAME"
        )
    return None if card is None else _with_rates(card, settings)


def _card_of_this_machine(ranks: int, given: Sequence[str]) -> Card | None:
    """With the memory that it has; None where there is none, or nothing is said of an unknown."""
    device = device_here()
    if not device:
        return None
    card = card_of_device(device)
    if card is None:
        if not given:
            return None
        card = _of_rates(device, ranks, [*given, "memory_gb"])
    return replace(card, memory=_memory_here())


def _named(name: str, ranks: int, given: Sequence[str]) -> Card:
    try:
        return find_card(name)
    except ConfigError:
        if not given:
            raise
    return _of_rates(name, ranks, given)


def _of_rates(name: str, ranks: int, given: Sequence[str]) -> Card:
    """A card that the table does not have, for the caller to put its rates in."""
    needed = [*_NEEDED, *(_LINKS if ranks > 1 else ())]
    if missing := [key for key in needed if key not in given]:
        raise ConfigError(
            f"{name} is not in the table of cards; of its rates {', '.join(missing)} are missing"
        )
    # Of what nothing is said, the slowest is taken.
    slowest = min(CARDS, key=lambda card: card.half_flops)
    return replace(slowest, name=name, fp8_flops=None, source=_GIVEN)


def _with_rates(card: Card, settings: PlanSettings) -> Card:
    rates: dict[str, Any] = {}
    for field, value, unit in (
        ("half_flops", settings.tflops, TERA),
        ("memory", settings.memory_gb, GB),
        ("bandwidth", settings.bandwidth_tb, TB),
        ("link", settings.link_gb, GB),
        ("network", settings.network_gb, GB),
    ):
        if value:
            rates[field] = value * unit
    told = card.source
    if rates and told != _GIVEN:
        told = f"{told}; as given: {', '.join(rates)}"
    return replace(card, **rates, source=told)
