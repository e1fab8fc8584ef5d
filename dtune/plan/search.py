"""The largest size that fits: bisected over a fit of what was counted, and counted at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction

from dtune.measure.passes import Passes

LIMIT = 1 << 24
"""Sizes beyond it are not looked for."""


class Fitted:
    """Passes as polynomials of second degree in a size, through three counted ones.

    What a model saves is in proportion to its tokens, masks grow with their square, and a little
    does not depend on them: three sizes say it all, but for steps of alignment and of chunks.
    """

    def __init__(self, count: Callable[[int], Passes], at: tuple[int, int, int]) -> None:
        self._at = at
        self._counted = [count(size) for size in at]

    def __call__(self, size: int) -> Passes:
        """Passes at a size; operations are left out."""
        weights = _lagrange(self._at, size)
        values = {
            field.name: round(
                sum(
                    w * getattr(one, field.name)
                    for w, one in zip(weights, self._counted, strict=True)
                )
            )
            for field in dataclasses.fields(Passes)
            if field.name != "operations"
        }
        return Passes(**values)


def _lagrange(at: tuple[int, int, int], size: int) -> list[Fraction]:
    weights = []
    for one in at:
        weight = Fraction(1)
        for other in at:
            if other != one:
                weight *= Fraction(size - other, one - other)
        weights.append(weight)
    return weights


def largest(
    fits: Callable[[int], bool], start: int = 1, *, least: int = 1, limit: int = LIMIT
) -> int:
    """The largest size that fits, from ``least`` to ``limit``; 0: none does.

    Of a property that ends once. ``start``: where it may end.
    """
    if not fits(least):
        return 0
    low, high = least, max(least + 1, start)
    while high < limit and fits(high):
        low, high = high, 2 * high
    if high >= limit:
        if fits(limit):
            return limit
        high = limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_counted(
    count: Callable[[int], Passes],
    fits: Callable[[Passes], bool],
    *,
    first: int,
    least: int = 1,
    limit: int = LIMIT,
) -> int:
    """The largest size whose counted passes fit, and the next one's do not; 0: none does.

    Bisects over what was fitted at sizes about ``first``, then again about what that gave. Where
    the counts at its end do not agree, because of a step, the counts themselves are bisected.
    """
    about = max(2 * least + 1, first)
    for _ in range(2):
        fitted = Fitted(count, (about - about // 2, about, about + about // 2))
        found = largest(lambda size: fits(fitted(size)), least=least, limit=limit)  # noqa: B023
        if (found == 0 or fits(count(found))) and (
            found >= limit or not fits(count(max(least, found + 1)))
        ):
            return found
        about = max(2 * least + 1, found)
    return largest(lambda size: fits(count(size)), start=found, least=least, limit=limit)
