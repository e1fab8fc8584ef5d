"""How long a step takes on a card, at least and probably: from what it computes and sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dtune.measure.cards import Card
from dtune.measure.operations import Operation
from dtune.parallel.traffic import Collective

PRODUCTS = 0.75
"""Of a card's peak, what products of matrices of a large model reach."""
ATTENTION = 0.45
"""The same of fused attention, causal, forward and backward together."""
MEMORY = 0.85
"""Of the bandwidth of its memory, what passes over long tensors reach."""
LINKS = 0.80
"""Of links between cards and to the host."""
LAUNCH = 6e-6
"""Seconds in which the host starts one operation of an eager model."""
ADAM_BYTES = 40
"""Moved for each trained element in a step: gradient, master and two fp32 moments, clipping."""

ASSUMPTIONS = (
    f"products of matrices at {PRODUCTS:.0%} of the card's peak, attention at {ATTENTION:.0%}",
    f"every other operation reads and writes its tensors at {MEMORY:.0%} of memory bandwidth, and "
    f"the optimizer, AdamW whichever it is, {ADAM_BYTES} bytes a trained parameter",
    f"the host starts an operation in {LAUNCH * 1e6:.0f} us, and the card never waits for data",
    f"collectives are rings at {LINKS:.0%} of links, of several nodes through every card's adapter",
    "gathers and bucketed reductions run beside the passes, one bucket of gradients after them, "
    "and copies between card and host beside both",
    "evaluation, checkpoints, compilation and the first steps are not in it",
)


@dataclass(frozen=True)
class Sent:
    """A collective over the links of a cluster."""

    collective: Collective
    between_nodes: int
    """Bytes that leave a node, in one direction."""
    seconds: float


@dataclass(frozen=True)
class Times:
    """Seconds of one optimizer step, and what they follow from."""

    floor: float
    """All that is computed, at the card's peak for products."""
    passes: float
    optimizer: float
    exposed: float
    """Collectives and copies to the host that nothing runs beside."""

    @property
    def step(self) -> float:
        """Predicted."""
        return self.passes + self.optimizer + self.exposed


def rate_of(card: Card, dtype: torch.dtype) -> float:
    """FLOP/s of products in a dtype."""
    return card.half_flops if dtype.itemsize <= 2 else card.single_flops


def floor_seconds(operations: Mapping[Operation, int], card: Card) -> float:
    """All that is computed, at the card's peak for products."""
    return sum(
        count * operation.flops / rate_of(card, operation.dtype)
        for operation, count in operations.items()
    )


def pass_seconds(operations: Mapping[Operation, int], card: Card) -> float:
    """Predicted of one micro batch: the device's, or the host's where that starts them later."""
    device = sum(count * _seconds(one, card) for one, count in operations.items())
    return max(device, LAUNCH * sum(operations.values()))


def _seconds(operation: Operation, card: Card) -> float:
    share = ATTENTION if operation.kind == "attention" else PRODUCTS
    computing = operation.flops / (share * rate_of(card, operation.dtype))
    return max(computing, operation.moved / (MEMORY * card.bandwidth))


def send(collective: Collective, card: Card | None, *, per_node: int) -> Sent:
    """How a collective crosses a cluster.

    Of the cards of a group that share a node, each has a ring through its own adapter.
    """
    together = max(1, min(collective.ranks, per_node // collective.apart))
    several = collective.ranks > together
    between = collective.sent if several else 0
    seconds = 0.0
    if card is not None:
        inside = collective.sent / (LINKS * card.link) if together > 1 else 0.0
        outside = between / together / (LINKS * card.network)
        seconds = max(inside, outside)
    return Sent(collective, between, seconds)


def predict(
    operations: Mapping[Operation, int],
    *,
    card: Card,
    micros: int,
    trained: int,
    sent: Sequence[Sent],
    copied: int,
) -> Times:
    """Seconds of a step.

    Args:
        operations: Of one micro batch.
        card: What it runs on.
        micros: Micro batches of a step.
        trained: Elements that this rank's optimizer steps.
        sent: Collectives of a step.
        copied: Bytes of a step that cross between the card and the host's memory.
    """
    passes = micros * pass_seconds(operations, card)
    optimizer = trained * ADAM_BYTES / (MEMORY * card.bandwidth)
    beside = sum(one.seconds for one in sent if one.collective.overlaps)
    after = sum(one.seconds for one in sent if not one.collective.overlaps)
    copies = copied / (LINKS * card.host_link)
    exposed = after + max(0.0, beside - passes) + max(0.0, copies - passes)
    return Times(micros * floor_seconds(operations, card), passes, optimizer, exposed)
