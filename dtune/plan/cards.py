"""The card that is planned for: of the table, of this machine, or of rates that the user gives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dtune.config.planning import PlanSettings
from dtune.config.suggest import did_you_mean, near_options
from dtune.errors import ConfigError
from dtune.measure.cards import CARDS, GB, TB, TERA, Card, card_of_device

__all__ = ["Card", "card_here", "card_of_device", "choose_card", "find_card"]

_NEEDED = ("tflops", "memory_gb", "bandwidth_tb")
_LINKS = ("link_gb", "network_gb")
_GIVEN = "as given"


def find_card(name: str) -> Card:
    """The card of the table by its name; ConfigError where it is not there."""
    wanted = name.lower().replace("-", "_")
    for card in CARDS:
        if card.name == wanted:
            return card
    names = [card.name for card in CARDS]
    raise ConfigError(
        f"card={name} is not in the table of cards ({', '.join(names)})"
        f"{did_you_mean([f'card={near}' for near in near_options(wanted, names)])}; give the rates "
        "of its data sheet: tflops=(dense bf16 TFLOP/s) memory_gb=(GB) bandwidth_tb=(TB/s), and "
        "for several cards link_gb=(GB/s to a card of the node) network_gb=(GB/s to other nodes)"
    )


def card_here() -> Card | None:
    """The card of this machine; None where it has none, or one that the table does not have."""
    if not torch.cuda.is_available():
        return None
    card = card_of_device(torch.cuda.get_device_name())
    if card is None:
        return None
    return replace(card, memory=float(torch.cuda.get_device_properties(0).total_memory))


def choose_card(settings: PlanSettings, ranks: int) -> Card | None:
    """The card that the settings of a plan name; None where there is none to be predicted for."""
    if settings.card == "none":
        return None
    given = [key for key in (*_NEEDED, *_LINKS) if getattr(settings, key)]
    card = card_here() if settings.card == "auto" else _named(settings, ranks, given)
    if card is None:
        if given:
            raise ConfigError(
                f"{given[0]} is a rate of a card, and this machine has none of the table; name "
                "the card: card=NAME"
            )
        return None
    return _with_rates(card, settings)


def _named(settings: PlanSettings, ranks: int, given: list[str]) -> Card:
    needed = [*_NEEDED, *(_LINKS if ranks > 1 else ())]
    try:
        return find_card(settings.card)
    except ConfigError:
        missing = [key for key in needed if key not in given]
        if len(missing) == len(needed):
            raise
        if missing:
            raise ConfigError(
                f"card={settings.card} is not in the table of cards; of its rates "
                f"{', '.join(missing)} are missing"
            ) from None
    # Every rate is put in by the caller. Of what nothing was said, the slowest is taken.
    slowest = min(CARDS, key=lambda card: card.half_flops)
    return replace(slowest, name=settings.card, fp8_flops=None, words=(), source=_GIVEN)


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
