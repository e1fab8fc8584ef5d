"""Packing: every row once in every epoch, no pack too full, and few slots empty."""

import sys
from bisect import bisect_left, insort
from types import FrameType

import numpy as np
import pytest

from dtune.data.pack import Packing, SequencePlan, plan_packing

SHAPES = {
    "equal": (np.full(100, 7), 50),
    "single": (np.array([5]), 5),
    "full": (np.full(9, 50), 50),
    "tiny": (np.ones(1000, np.int64), 64),
    "uniform": (np.random.default_rng(1).integers(1, 129, 3000), 128),
    "skewed": (np.random.default_rng(2).lognormal(3, 1, 3000).astype(np.int64).clip(1, 512), 512),
}


def packs_of(packing: Packing) -> list[list[int]]:
    return [part.tolist() for part in np.split(packing.slots, packing.starts[1:-1])]


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[int]:
    """Fill of each pack, one row after another: what plan_packing does in bulk."""
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        at = bisect_left(rooms, length)
        room = rooms.pop(at) if at < len(rooms) else capacity
        insort(rooms, room - length)
    return sorted(capacity - room for room in rooms)


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_is_best_fit_decreasing(shape: str) -> None:
    lengths, capacity = SHAPES[shape]
    by_slot = np.sort(lengths)[::-1]
    fills = sorted(int(by_slot[pack].sum()) for pack in packs_of(plan_packing(lengths, capacity)))
    assert fills == best_fit_decreasing(lengths, capacity)
    assert fills[-1] <= capacity


@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_has_one_slot(shape: str) -> None:
    lengths, capacity = SHAPES[shape]
    packing = plan_packing(lengths, capacity)
    assert sorted(packing.slots.tolist()) == list(range(len(lengths)))
    assert all(packs_of(packing))


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_epoch_has_every_row_once_and_no_pack_too_full(
    shape: str, shuffle: bool, packing: bool
) -> None:
    lengths, capacity = SHAPES[shape]
    plan = SequencePlan(lengths, max_length=capacity, packing=packing, shuffle=shuffle, seed=3)
    for epoch in range(2):
        start = epoch * plan.num_sequences
        sequences = [plan.rows(start + i) for i in range(plan.num_sequences)]
        rows = [row for sequence in sequences for row in sequence]
        assert sorted(rows) == list(range(len(lengths)))
        assert max(lengths[sequence].sum() for sequence in sequences) <= capacity


def order(seed: int, epoch: int, *, shuffle: bool = True, packing: bool = True) -> list[list[int]]:
    lengths, capacity = SHAPES["uniform"]
    plan = SequencePlan(lengths, max_length=capacity, packing=packing, shuffle=shuffle, seed=seed)
    count = plan.num_sequences
    return [plan.rows(epoch * count + i) for i in range(count)]


@pytest.mark.parametrize("packing", [True, False])
def test_the_order_is_a_function_of_seed_and_epoch(packing: bool) -> None:
    assert order(1, 2, packing=packing) == order(1, 2, packing=packing)
    assert order(1, 2, packing=packing) != order(1, 3, packing=packing)
    assert order(1, 2, packing=packing) != order(2, 2, packing=packing)


def test_packs_are_put_together_anew_in_every_epoch() -> None:
    first, second = ({tuple(sorted(pack)) for pack in order(1, epoch)} for epoch in (0, 1))
    assert len(first & second) < len(first) / 2


def test_without_shuffling_rows_keep_their_order() -> None:
    assert order(0, 1, shuffle=False, packing=False) == [[row] for row in range(3000)]
    firsts = [min(pack) for pack in order(0, 1, shuffle=False)]
    assert firsts == sorted(firsts)


def test_epochs_can_be_visited_in_any_order() -> None:
    lengths, capacity = SHAPES["uniform"]
    plan = SequencePlan(lengths, max_length=capacity, packing=True, shuffle=True, seed=0)
    count = plan.num_sequences
    positions = [0, count, 3 * count + 5, 1, count - 1]
    there = [plan.rows(at) for at in positions]
    assert [plan.rows(at) for at in reversed(positions)] == there[::-1]


def test_a_million_rows_are_packed_tightly_and_not_row_by_row() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1, 10**6).astype(np.int64).clip(4, 4096)
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        plan = SequencePlan(lengths, max_length=4096, packing=True, shuffle=True, seed=0)
        plan.rows(plan.num_sequences)
    finally:
        sys.setprofile(None)
    # A method that goes row by row calls something for each.
    assert calls < len(lengths) / 2
    assert lengths.sum() / (4096 * plan.num_sequences) > 0.99
