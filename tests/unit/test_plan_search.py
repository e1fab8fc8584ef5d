"""The largest size that fits is the one of the counts, whatever steps they have."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dtune.measure.passes import Passes
from dtune.plan.search import LIMIT, Fitted, largest, largest_counted


def of(saved: int) -> Passes:
    return Passes(saved, 0, 0, 0, saved, saved, saved, saved, saved)


COUNTS: dict[str, Callable[[int], int]] = {
    "line": lambda size: 1000 + 37 * size,
    "square": lambda size: 500 + 11 * size + 3 * size * size,
    "rounded up": lambda size: 100 + 8 * (-(-size // 32) * 32),
    "chunks": lambda size: 50 * size + 700 * min(size, 300),
    "chunks that end late": lambda size: 50 * size + 700 * min(size, 30_000),
}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("memory", [2_000, 123_456, 7_000_000, 1_000_000_007])
@pytest.mark.parametrize("first", [4, 2048])
def test_it_is_the_last_size_that_is_counted_to_fit(name: str, memory: int, first: int) -> None:
    count = COUNTS[name]
    found = largest_counted(
        lambda size: of(count(size)), lambda passes: passes.peak <= memory, first=first
    )
    assert found == largest(lambda size: count(size) <= memory)
    if found:
        assert count(found) <= memory
    assert count(found + 1) > memory or found == LIMIT


@pytest.mark.parametrize("name", ["line", "square"])
def test_what_has_no_steps_is_fitted_exactly_and_counted_seldom(name: str) -> None:
    count, counted = COUNTS[name], []

    def note(size: int) -> Passes:
        counted.append(size)
        return of(count(size))

    fitted = Fitted(note, (1024, 2048, 3072))
    assert [fitted(size).peak for size in (1, 77, 10**6)] == [count(n) for n in (1, 77, 10**6)]
    counted.clear()
    largest_counted(note, lambda passes: passes.peak <= 10**9, first=2048)
    assert len(counted) <= 5


def test_the_limit_is_never_passed() -> None:
    assert largest_counted(lambda size: of(1), lambda passes: True, first=4, limit=4096) == 4096
    assert largest_counted(lambda size: of(1), lambda passes: False, first=4) == 0
