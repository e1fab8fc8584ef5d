"""A plan in words, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from dtune.measure.cards import GB, TB, TERA, Card, card_of_device
from dtune.measure.memory import GIB
from dtune.plan.cards import HOW, device_here
from dtune.plan.run import RunPlan
from dtune.plan.solve import Choice
from dtune.plan.times import ASSUMPTIONS, Sent
from dtune.types import Batch

SHOWN = 10
"""Choices that are shown of all that fit."""


def card_rows(card: Card | None) -> list[tuple[str, str]]:
    """The card's rates, and where they are from."""
    if card is None:
        device = device_here()
        if device and card_of_device(device) is None:
            return [
                ("card", f"{device}, of this machine, is not in the table; for times give {HOW}")
            ]
        return [("card", "none is named and none is here: card=h200 gives times and what fits")]
    rates = (
        f"{card.name}: {card.half_flops / TERA:,.0f} TFLOP/s bf16, {card.memory / GIB:.1f} GiB at "
        f"{card.bandwidth / TB:.2f} TB/s, {card.link / GB:.1f} GB/s to cards of the node, "
        f"{card.network / GB:.1f} GB/s to other nodes"
    )
    return [("card", rates), ("card", f"by {card.source}")]


def memory_lines(plan: RunPlan, batch: Batch) -> list[str]:
    """Memory by part, and whether it fits."""
    rows, width = batch.input_ids.shape
    head = (
        f"memory of the fullest of {plan.ranks} ranks, a micro batch of {rows} x {width} tokens, "
        f"{batch.num_targets:,} of them trained on"
    )
    lines = [head, *plan.memory.rows()]
    if plan.card is not None:
        words = "fits" if plan.fits else "does not fit"
        lines.append(f"{words} {plan.card.name} ({plan.card.memory / GIB:.2f} GiB) by high")
    return lines


def work_lines(plan: RunPlan) -> list[str]:
    """FLOPs, bytes and collectives of a step."""
    lines = [
        f"a step of a rank: {plan.flops:.4g} FLOPs computed, {plan.moved:.4g} bytes moved, "
        f"{plan.micros * sum(plan.operations.values()):,} operations",
        f"a token: {plan.model_flops:.4g} FLOPs without what is computed again",
    ]
    return [*lines, *map(_sent, plan.sent)]


def _sent(sent: Sent) -> str:
    one = sent.collective
    beside = "" if one.overlaps else ", after the passes"
    return (
        f"{one.name} of {one.what} over {one.ranks} ranks: {one.sent:,} bytes from a rank, "
        f"{sent.between_nodes:,} between nodes{beside}"
    )


def time_lines(plan: RunPlan, *, steps: int) -> list[str]:
    """Floor, prediction and hours; ``steps``: 0 where their number is not known."""
    times, speed = plan.times, plan.slots_per_second
    if times is None or speed is None or plan.mfu is None:
        return []
    lines = [
        f"floor: {times.floor:.4g} s a step, {plan.slots / times.floor:,.0f} tokens/s",
        f"predicted: {times.step:.4g} s a step = {times.passes:.4g} passes + "
        f"{times.optimizer:.4g} optimizer + {times.exposed:.4g} that nothing runs beside",
        f"predicted: {speed:,.0f} tokens/s, {speed / plan.ranks:,.0f} a card, MFU {plan.mfu:.1%}; "
        f"{plan.tokens / times.step:,.0f} tokens/s without padding",
    ]
    if steps:
        hours = steps * times.step / 3600
        lines.append(
            f"predicted: {steps:,} steps in {hours:.2f} hours, {hours * plan.ranks:.2f} GPU-hours"
        )
    return [*lines, "assumed:", *(f"  {one}" for one in ASSUMPTIONS)]


def cheapest_lines(choices: Sequence[Choice]) -> list[str]:
    """The best of what fits, best first."""
    if not choices:
        return ["find=cheapest: nothing fits; quant=nf4 or more gpus= may"]
    head = f"find=cheapest: the first of {len(choices)} that fit, by predicted GPU-hours"
    return [head, *(choice.row() for choice in choices[:SHOWN])]
