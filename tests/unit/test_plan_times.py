"""Times follow from rates: of operations, of the host, and of links inside of and between nodes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dtune.measure.operations import Operation
from dtune.parallel.traffic import Collective
from dtune.plan import times
from dtune.plan.cards import find_card

CARD = find_card("h200")
PRODUCT = Operation("product", torch.bfloat16, int(1e12), int(1e9))
PASS = Operation("other", torch.bfloat16, 0, int(1e9))


def test_the_floor_is_all_products_at_the_peak() -> None:
    operations = Counter({PRODUCT: 3, PASS: 5})
    assert times.floor_seconds(operations, CARD) == pytest.approx(3e12 / 989e12)
    in_fp32 = Counter({PRODUCT._replace(dtype=torch.float32): 3})
    assert times.floor_seconds(in_fp32, CARD) == pytest.approx(3e12 / 67e12)


def test_an_operation_takes_what_it_computes_or_what_it_moves() -> None:
    computed = times.pass_seconds(Counter({PRODUCT: 1}), CARD)
    assert computed == pytest.approx(1e12 / (times.PRODUCTS * 989e12))
    moved = times.pass_seconds(Counter({PASS: 1}), CARD)
    assert moved == pytest.approx(1e9 / (times.MEMORY * 4.8e12))
    both = times.pass_seconds(Counter({PRODUCT: 2, PASS: 3}), CARD)
    assert both == pytest.approx(2 * computed + 3 * moved)


def test_small_operations_wait_for_the_host() -> None:
    tiny = Operation("other", torch.bfloat16, 0, 100)
    assert times.pass_seconds(Counter({tiny: 1000}), CARD) == pytest.approx(1000 * times.LAUNCH)


@pytest.mark.parametrize(
    ("ranks", "apart", "between", "seconds"),
    [
        # Inside of a node.
        (8, 1, 0, 1e9 / 450e9),
        (4, 2, 0, 1e9 / 450e9),
        # All cards of a node send through adapters of their own.
        (64, 1, 10**9, 1e9 / 8 / 50e9),
        # Each card alone with its likes of other nodes.
        (8, 8, 10**9, 1e9 / 50e9),
    ],
)
def test_a_collective_goes_by_the_slowest_link(
    ranks: int, apart: int, between: int, seconds: float
) -> None:
    sent = times.send(Collective("all-reduce", "x", 10**9, ranks, apart), CARD, per_node=8)
    assert sent.between_nodes == between
    assert sent.seconds == pytest.approx(seconds / times.LINKS)


def test_only_what_nothing_runs_beside_is_added() -> None:
    def predicted(*collectives: Collective, copied: int = 0) -> times.Times:
        sent = [times.send(one, CARD, per_node=8) for one in collectives]
        return times.predict(
            Counter({PRODUCT: 100}), card=CARD, micros=2, trained=10**6, sent=sent, copied=copied
        )

    alone = predicted()
    assert alone.exposed == 0
    assert alone.step == alone.passes + alone.optimizer
    assert alone.floor == pytest.approx(2 * 100e12 / 989e12)
    beside = Collective("all-gather", "weights", 10**9, 8)
    assert predicted(beside).step == alone.step
    after = Collective("all-reduce", "gradients", 10**9, 8, overlaps=False)
    assert predicted(after).exposed == pytest.approx(1e9 / 450e9 / times.LINKS)
    many = Collective("all-gather", "weights", 10**12, 8)
    assert predicted(many).step > 2 * alone.step
    assert predicted(copied=10**9).step == alone.step
    assert predicted(copied=2 * 10**12).step > 2 * alone.step
