"""Rates of the cards that times are predicted for, each from its maker's data sheet."""

from __future__ import annotations

import re
from dataclasses import dataclass

GB = 1e9
TB = 1e12
TERA = 1e12


@dataclass(frozen=True)
class Card:
    """One kind of GPU, and how several of them are wired. Rates are dense, without sparsity."""

    name: str
    half_flops: float
    """bf16 and fp16 on tensor cores with fp32 sums, FLOP/s."""
    fp8_flops: float | None
    """FLOP/s; None where the card has no such units."""
    single_flops: float
    """fp32 outside of tensor cores, FLOP/s."""
    memory: float
    """Bytes. Of data sheets, in GB of 1e9 bytes."""
    bandwidth: float
    """Of the card's own memory, read and written together, bytes/s."""
    link: float
    """To the other cards of a node, from one card in one direction, bytes/s."""
    network: float
    """To other nodes, from one card in one direction, bytes/s."""
    host_link: float
    """To host memory in one direction, bytes/s."""
    source: str
    words: tuple[str, ...] = ()
    """Of the name that CUDA gives the device: all of them are in it."""
    without: tuple[str, ...] = ()
    """Words that other cards of that name have: none of them is in it."""


# The network is that of the maker's reference system, one adapter a card; of those without one,
# 100 Gbit/s shared by eight.
_NO_REFERENCE = 12.5 * GB / 8

CARDS: tuple[Card, ...] = (
    Card(
        *("b200", 2250 * TERA, 4500 * TERA, 75 * TERA, 180 * GB, 7.7 * TB),
        *(900 * GB, 50 * GB, 64 * GB),
        "NVIDIA HGX B200 data sheet (2025); network: DGX B200, ConnectX-7, 400 Gbit/s a card",
        ("B200",),
    ),
    Card(
        *("h200", 989 * TERA, 1979 * TERA, 67 * TERA, 141 * GB, 4.8 * TB),
        *(450 * GB, 50 * GB, 64 * GB),
        "NVIDIA H200 SXM data sheet (2024); network: DGX H200, ConnectX-7, 400 Gbit/s a card",
        *(("H200",), ("NVL",)),
    ),
    Card(
        *("h100_pcie", 756 * TERA, 1513 * TERA, 51 * TERA, 80 * GB, 2.0 * TB),
        *(64 * GB, _NO_REFERENCE, 64 * GB),
        "NVIDIA H100 PCIe data sheet (2023), without NVLink bridges; network: assumed",
        ("H100", "PCIE"),
    ),
    Card(
        *("h100", 989 * TERA, 1979 * TERA, 67 * TERA, 80 * GB, 3.35 * TB),
        *(450 * GB, 50 * GB, 64 * GB),
        "NVIDIA H100 SXM data sheet (2023); network: DGX H100, ConnectX-7, 400 Gbit/s a card",
        *(("H100",), ("PCIE", "NVL")),
    ),
    Card(
        *("a100_40gb", 312 * TERA, None, 19.5 * TERA, 40 * GB, 1.555 * TB),
        *(300 * GB, 25 * GB, 32 * GB),
        "NVIDIA A100 data sheet (2021); network: DGX A100, ConnectX-6, 200 Gbit/s a card",
        *(("A100", "40GB"), ("PCIE",)),
    ),
    Card(
        *("a100_pcie", 312 * TERA, None, 19.5 * TERA, 80 * GB, 1.935 * TB),
        *(32 * GB, _NO_REFERENCE, 32 * GB),
        "NVIDIA A100 80GB PCIe data sheet (2021), without NVLink bridges; network: assumed",
        ("A100", "80GB", "PCIE"),
    ),
    Card(
        *("a100", 312 * TERA, None, 19.5 * TERA, 80 * GB, 2.039 * TB),
        *(300 * GB, 25 * GB, 32 * GB),
        "NVIDIA A100 80GB SXM data sheet (2021); network: DGX A100, ConnectX-6, 200 Gbit/s a card",
        *(("A100",), ("PCIE", "40GB")),
    ),
    Card(
        *("l40s", 362 * TERA, 733 * TERA, 91.6 * TERA, 48 * GB, 0.864 * TB),
        *(32 * GB, _NO_REFERENCE, 32 * GB),
        "NVIDIA L40S data sheet (2023), PCIe 4.0 x16 between cards; network: assumed",
        ("L40S",),
    ),
    Card(
        *("4090", 165 * TERA, 330 * TERA, 82.6 * TERA, 24 * GB, 1.008 * TB),
        *(32 * GB, _NO_REFERENCE, 32 * GB),
        "NVIDIA Ada architecture whitepaper (2022), PCIe 4.0 x16 between cards; network: assumed",
        *(("RTX", "4090"), ("D", "LAPTOP")),
    ),
)


def card_of_device(device_name: str) -> Card | None:
    """The card that CUDA calls so; None where the table does not have it."""
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    return next(
        (card for card in CARDS if words.issuperset(card.words) and words.isdisjoint(card.without)),
        None,
    )
