"""What a search may choose from, and how a choice is written as a setting. Imports no optuna."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dtune.errors import ConfigError

# A learning rate of six digits is told apart from its neighbours, and can be read.
_DIGITS = 6


@dataclass(frozen=True)
class Words:
    """One of several settings, as Hydra's grammar writes them."""

    choices: tuple[str, ...]


@dataclass(frozen=True)
class Numbers:
    """A number between two others, both of them included."""

    low: float
    high: float
    step: float = 0
    """0: any between the two."""
    is_log: bool = False
    is_int: bool = False

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ConfigError(f"{self.low:g} to {self.high:g} is empty")
        if self.is_log and self.low <= 0:
            raise ConfigError(f"{self.low:g} has no logarithm: begin above 0")
        if self.is_log and self.step not in (0, 1):
            raise ConfigError("tag(log, ...) takes an interval, or a range without a step")


Axis = Words | Numbers
Space = Mapping[str, Axis]
"""By key, with Hydra's ``+`` before it where it was given."""


def write_choice(axis: Axis, value: str | float) -> str:
    """A value of an axis as the right side of an override."""
    if isinstance(axis, Words):
        return str(value)
    if axis.is_int:
        return str(int(value))
    rounded = float(f"{float(value):.{_DIGITS}g}")
    return repr(min(max(rounded, axis.low), axis.high))


def write_overrides(space: Space, values: Mapping[str, str | float]) -> list[str]:
    """The overrides of a trial that the search has chosen."""
    return [f"{key}={write_choice(space[key], value)}" for key, value in values.items()]


def range_of(start: float, stop: float, step: float, *, is_log: bool) -> Numbers:
    """Hydra's ``range(start, stop, step)``, whose stop is not included."""
    is_int = all(isinstance(number, int) for number in (start, stop, step))
    if step <= 0:
        raise ConfigError(f"a search takes a range with a step above 0, not {step:g}")
    count = -int((start - stop) // step)
    if count < 1:
        raise ConfigError(f"range({start:g}, {stop:g}, {step:g}) is empty")
    return Numbers(start, start + (count - 1) * step, step, is_log, is_int)


def refuse_tags(tags: Sequence[str]) -> None:
    """ConfigError for a tag that means nothing here."""
    unknown = sorted(set(tags) - {"log"})
    if unknown:
        raise ConfigError(f"tag({unknown[0]}, ...) means nothing here; the only tag is log")
