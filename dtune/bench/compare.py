"""Two files of results held against each other: slower, or larger, beyond the noise of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import hypot
from statistics import median

from dtune.bench.record import CaseResult, Measured
from dtune.bench.table import Combined, combine
from dtune.errors import ConfigError

MEMORY_NOISE = 0.01
"""Least difference of memory that counts: allocators round, and runs are few."""

STUDENT = dict(
    zip(range(2, 12), (4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20), strict=True)
)
"""Degrees of freedom -> quantile of 97.5 % of Student's distribution; 2 above."""

_ABSENT = "absent"


@dataclass(frozen=True)
class Change:
    """One number of one case, before and now."""

    case: str
    what: str
    old: float
    new: float
    noise: float
    """Share of the old number below which the two are the same."""
    more_is_worse: bool

    @property
    def share(self) -> float:
        """By which share of the old number it has grown."""
        return self.new / self.old - 1

    @property
    def verdict(self) -> str:
        """Whether it is ``worse``, ``better`` or the ``same`` within the noise."""
        if abs(self.share) <= self.noise:
            return "same"
        return "worse" if (self.share > 0) == self.more_is_worse else "better"


@dataclass(frozen=True)
class Comparison:
    """What two files come to."""

    changes: tuple[Change, ...]
    lost: tuple[str, ...]
    """Cases that gave numbers before and give none now, with the reason."""
    vanished: tuple[str, ...]
    """Cases that gave numbers before, and that NEW has not."""
    told: tuple[str, ...]
    """Other cases of which there is nothing to compare, with the reason."""

    @property
    def is_regression(self) -> bool:
        """Whether anything is worse than it was, or is there no more."""
        is_worse = any(change.verdict == "worse" for change in self.changes)
        return is_worse or bool(self.lost or self.vanished)

    def lines(self) -> list[str]:
        """As a table, the worse ones marked."""
        rows = [
            (
                change.case,
                change.what,
                f"{change.old:,.4g}",
                f"{change.new:,.4g}",
                f"{change.share:+.1%}",
                f"noise {change.noise:.1%}",
                change.verdict.upper() if change.verdict == "worse" else change.verdict,
            )
            for change in self.changes
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        return [*(line.rstrip() for line in table), *self.lost, *self.vanished, *self.told]


def differences(old: Sequence[CaseResult], new: Sequence[CaseResult]) -> list[str]:
    """What of machine, versions and work differs, so that the numbers cannot be held together."""
    found: list[str] = []
    for title in ("hardware", "versions"):
        one, other = _facts_of(old, title), _facts_of(new, title)
        # Of cases whose processes all died at once nothing is known.
        found += _differing(title, one, other) if one and other else []
    before, now = _by_case(old), _by_case(new)
    for key, case in before.items():
        if key in now:
            found += _differing(case.case, case.results[0].settings, now[key].results[0].settings)
    return found


def commits(old: Sequence[CaseResult], new: Sequence[CaseResult]) -> list[str]:
    """The commits, where they differ: what a comparison is mostly made for, and so no obstacle."""
    one, other = (
        " and ".join(dict.fromkeys(filter(None, (each.origin.commit for each in results))))
        or "unknown"
        for results in (old, new)
    )
    return [] if one == other else [f"commit: {one} and {other}"]


def _facts_of(results: Sequence[CaseResult], title: str) -> dict[str, str]:
    """Facts of all results that ran; where they differ within the file, all of them."""
    facts: dict[str, dict[str, None]] = {}
    for result in results:
        for name, value in vars(result.origin)[title].items():
            facts.setdefault(name, {})[value] = None
    return {name: " and ".join(values) for name, values in facts.items()}


def _differing(title: str, one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    return [
        f"{title}: {name}: {one.get(name, _ABSENT)} and {other.get(name, _ABSENT)}"
        for name in dict.fromkeys([*one, *other])
        if one.get(name, _ABSENT) != other.get(name, _ABSENT)
    ]


def _by_case(results: Sequence[CaseResult]) -> dict[tuple[str, str], Combined]:
    return {(one.framework, one.case): one for one in combine(results)}


def compare(old: Sequence[CaseResult], new: Sequence[CaseResult]) -> Comparison:
    """Hold every case of both files against itself."""
    before, now = _by_case(old), _by_case(new)
    changes: list[Change] = []
    lost: list[str] = []
    vanished: list[str] = []
    told: list[str] = []
    for key, one in before.items():
        name, other = " ".join(key), now.get(key)
        if not one.whole:
            told.append(f"{name}: not compared, {_without_numbers(one)} in OLD")
        elif other is None:
            vanished.append(f"only in OLD: {name}")
        elif not other.whole:
            lost.append(f"{name}: measured before, now {_without_numbers(other)}")
        else:
            changes += _changes(one, other)
    told += [f"only in NEW: {' '.join(key)}" for key in now if key not in before]
    return Comparison(tuple(changes), tuple(lost), tuple(vanished), tuple(told))


def _without_numbers(case: Combined) -> str:
    """How its first run without numbers ended, and why."""
    bad = next(result for result in case.results if result.measured is None)
    return f"{bad.status.value}: {bad.reason}"


def chosen(results: Sequence[CaseResult], pattern: str) -> list[CaseResult]:
    """The results of the cases whose name a pattern of a shell fits.

    Raises:
        ConfigError: It fits none.
    """
    found = [result for result in results if fnmatchcase(result.case, pattern)]
    if not found:
        names = ", ".join(dict.fromkeys(result.case for result in results))
        raise ConfigError(f"cases={pattern} fits no case: there are {names}")
    return found


def _changes(one: Combined, other: Combined) -> list[Change]:
    name = one.case
    changes = [
        Change(
            name,
            "tokens/s",
            one.tokens_per_second,
            other.tokens_per_second,
            noise_of(one, other),
            more_is_worse=False,
        )
    ]
    for what, take in _SIZES:
        olds, news = ([take(each) for each in case.measured] for case in (one, other))
        if None in olds or None in news:
            continue
        numbers = [value or 0 for value in olds], [value or 0 for value in news]
        noise = MEMORY_NOISE + sum(map(_spread, numbers))
        old, new = (median(values) / 2**30 for values in numbers)
        changes.append(Change(name, what, old, new, noise, more_is_worse=True))
    return changes


def noise_of(old: Combined, new: Combined) -> float:
    """Share by which step times must differ to be different.

    Of several runs each: what their means differ by with 95 % probability if nothing changed
    (Student's t), and no less than twice what the steps of a run leave uncertain. Of a single one:
    the spread of its steps, which is more than their median is uncertain by.
    """
    counts = len(old.measured), len(new.measured)
    if min(counts) == 1:
        return old.spread + new.spread
    freedom = sum(counts) - 2
    error = hypot(old.spread / counts[0] ** 0.5, new.spread / counts[1] ** 0.5)
    within = hypot(old.within, new.within)
    return max(STUDENT.get(freedom, 2.0) * error, 2 * within)


_SIZES: tuple[tuple[str, Callable[[Measured], int | None]], ...] = (
    ("peak GiB", lambda one: one.peak_bytes),
    ("reserved GiB", lambda one: one.peak_reserved_bytes),
    ("tensors GiB", lambda one: one.counted_bytes),
)


def _spread(values: Sequence[float]) -> float:
    """Half of the distance between the extremes, as a share of the median."""
    return (max(values) - min(values)) / 2 / median(values)
