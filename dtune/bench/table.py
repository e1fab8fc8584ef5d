"""Results as text: a line each, and a Markdown table with a row for each case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median, stdev

from dtune.bench.record import GIB, CaseResult, Measured, Score, Status, quantile
from dtune.errors import ConfigError

Key = tuple[str, str]
"""Framework and case."""

NOTHING = "-"
"""In a cell of which nothing is known."""


@dataclass(frozen=True)
class Combined:
    """All repeats of one case."""

    framework: str
    case: str
    results: tuple[CaseResult, ...]

    @property
    def measured(self) -> list[Measured]:
        """Numbers of those that have any."""
        return [one.measured for one in self.results if one.measured is not None]

    @property
    def whole(self) -> bool:
        """Whether every repeat gave numbers: else none of them is shown."""
        return all(one.status is Status.ok for one in self.results)

    @property
    def spread(self) -> float:
        """How far runs of the case lie apart, as a share of their median.

        The standard deviation between the medians of the runs. Of a single run nothing is known of
        others: half of the distance between p10 and p90 of its own steps instead.
        """
        medians = [one.median_seconds for one in self.measured]
        if len(medians) > 1:
            return stdev(medians) / median(medians)
        return _half_width(self.measured[0])

    @property
    def within(self) -> float:
        """What the steps of one run leave uncertain of its median, as a share of it."""
        return max(_half_width(one) / sqrt(len(one.step_seconds)) for one in self.measured)

    @property
    def step_seconds(self) -> tuple[float, float, float]:
        """Median, p10 and p90 over the steps of all repeats."""
        steps = [seconds for one in self.measured for seconds in one.step_seconds]
        return quantile(steps, 0.5), quantile(steps, 0.1), quantile(steps, 0.9)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices, by the median over the repeats' medians."""
        return median(one.tokens_per_second for one in self.measured)


def _half_width(one: Measured) -> float:
    return (one.p90_seconds - one.p10_seconds) / 2 / one.median_seconds


Cell = Callable[[Combined], str]
Column = tuple[str, Cell]


def combine(results: Sequence[CaseResult]) -> list[Combined]:
    """Put the repeats of each case together, in the order of their first.

    Raises:
        ConfigError: Two results of the same name are of different work.
    """
    groups: dict[Key, list[CaseResult]] = {}
    for result in results:
        group = groups.setdefault((result.framework, result.case), [])
        if group and group[0].settings != result.settings:
            raise ConfigError(
                f"results of different work have one name, {result.framework} {result.case}: those "
                "of several benches do not belong into one file"
            )
        group.append(result)
    return [Combined(*key, tuple(group)) for key, group in groups.items()]


def line_of(result: CaseResult) -> str:
    """One result on one line of the terminal."""
    repeat = f" (repeat {result.repeat + 1})" if result.repeat else ""
    name = f"{result.case}{repeat}"
    one = result.measured
    if one is None:
        return f"{name}: {result.status.value}: {result.reason}"
    parts = [
        f"{one.tokens_per_second_per_device:,.0f} tokens/s per device",
        f"step {one.median_seconds * 1e3:,.1f} ms",
    ]
    if one.peak_bytes is not None:
        kind = "allocated" if one.peak_allocated_bytes is not None else "RSS"
        parts.append(f"peak {one.peak_bytes / GIB:.2f} GiB {kind}")
    if one.share_of_ceiling is not None:
        parts.append(f"{one.share_of_ceiling:.0%} of the measured ceiling")
    return f"{name}: {', '.join(parts)}"


def markdown(results: Sequence[CaseResult]) -> str:
    """The table, the formulas behind it, where it was measured, and the notes."""
    combined = combine(results)
    lines = _table(combined, [*_NUMBERS, *_score_columns(combined)])
    return "\n".join([*lines, "", *_below(combined)]) + "\n"


def markdown_in_short(results: Sequence[CaseResult]) -> str:
    """A table of what methods are chosen by, and where it was measured."""
    combined = combine(results)
    numbers = [column for column in _NUMBERS if column[0] in IN_SHORT]
    lines = _table(combined, [*numbers, *_score_columns(combined)])
    where = dict.fromkeys(_facts(result.origin.hardware) for result in results)
    return "\n".join([*lines, "", *(f"Measured on {facts}." for facts in where if facts)]) + "\n"


def _table(combined: Sequence[Combined], columns: Sequence[Column]) -> list[str]:
    """Lines, with those of the columns in which at least one case has something to say."""
    told = [column for column in columns if any(column[1](one) != NOTHING for one in combined)]
    shown = [*_identity(combined), *told]
    head = " | ".join(name for name, _ in shown)
    rows = [f"| {' | '.join(cell(one) for _, cell in shown)} |" for one in combined]
    return [f"| {head} |", f"|{'---|' * len(shown)}", *rows]


def _identity(combined: Sequence[Combined]) -> list[Column]:
    columns: list[Column] = [("case", _case_cell)]
    if len({one.framework for one in combined}) > 1:
        columns.insert(0, ("framework", lambda one: one.framework))
    return columns


def _case_cell(one: Combined) -> str:
    if one.whole:
        return f"`{one.case}`"
    bad = next(result for result in one.results if result.status is not Status.ok)
    return f"`{one.case}`: **{bad.status.value}**: {_escaped(bad.reason)}"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _number(take: Callable[[Measured], float | None], form: str, factor: float = 1.0) -> Cell:
    """A cell with the median over the repeats."""

    def cell(one: Combined) -> str:
        if not one.whole:
            return NOTHING
        values = [value for each in one.measured if (value := take(each)) is not None]
        return format(median(values) * factor, form) if values else NOTHING

    return cell


def _step_cell(one: Combined) -> str:
    if not one.whole:
        return NOTHING
    middle, low, high = (1e3 * seconds for seconds in one.step_seconds)
    return f"{middle:,.1f} ({low:,.1f} to {high:,.1f})"


def _spread_cell(one: Combined) -> str:
    return f"{one.spread:.1%}" if one.whole else NOTHING


def _peak_cell(one: Combined) -> str:
    if not one.whole:
        return NOTHING
    allocated = [each.peak_allocated_bytes for each in one.measured]
    if None in allocated:
        return NOTHING
    reserved = max(each.peak_reserved_bytes or 0 for each in one.measured)
    return f"{max(each or 0 for each in allocated) / GIB:.2f} ({reserved / GIB:.2f})"


def _rss_cell(one: Combined) -> str:
    if not one.whole or any(each.peak_rss_bytes is None for each in one.measured):
        return NOTHING
    peak = max(each.peak_rss_bytes or 0 for each in one.measured)
    base = max(each.base_rss_bytes or 0 for each in one.measured)
    return f"{peak / GIB:.2f} ({base / GIB:.2f})"


def _counted_cell(one: Combined) -> str:
    if not one.whole or any(each.counted_bytes is None for each in one.measured):
        return NOTHING
    return f"{max(each.counted_bytes or 0 for each in one.measured) / GIB:.3f}"


def _plan_cell(one: Combined) -> str:
    if not one.whole or any(each.plan_error is None for each in one.measured):
        return NOTHING
    planned = one.measured[0].planned_bytes or 0
    error = median(each.plan_error or 0.0 for each in one.measured)
    return f"{planned / GIB:.3f} ({error:+.1%})"


def _launch_cell(one: Combined) -> str:
    if not one.whole or one.measured[0].launches_per_step is None:
        return NOTHING
    first = one.measured[0]
    return f"{first.launches_per_step:,} {first.launches_of}"


def _loss_cell(one: Combined) -> str:
    if not one.whole:
        return NOTHING
    return f"{one.measured[0].loss_first:.3f} to {one.measured[0].loss_last:.3f}"


_NUMBERS: list[Column] = [
    ("trained parameters", _number(lambda one: one.trained_parameters, ",.0f")),
    ("tokens/s per device", _number(lambda one: one.tokens_per_second_per_device, ",.0f")),
    ("tokens/s in all", _number(lambda one: one.tokens_per_second, ",.0f")),
    ("with padding, tokens/s", _number(lambda one: one.slots_per_second, ",.0f")),
    ("trained, tokens/s", _number(lambda one: one.targets_per_second, ",.0f")),
    ("step, ms (p10 to p90)", _step_cell),
    ("spread", _spread_cell),
    ("MFU", _number(lambda one: one.mfu, ".1%")),
    ("of the measured ceiling", _number(lambda one: one.share_of_ceiling, ".1%")),
    ("peak GiB, allocated (reserved)", _peak_cell),
    ("peak RSS GiB (before the model)", _rss_cell),
    ("tensors GiB", _counted_cell),
    ("planned GiB (error)", _plan_cell),
    ("launches a step", _launch_cell),
    ("warm-up, s", _number(lambda one: one.warm_up_seconds, ",.1f")),
    ("first step, s", _number(lambda one: one.first_step_seconds, ",.1f")),
    ("J a step", _number(lambda one: one.joules_per_step, ",.1f")),
    ("loss on the fixed batch", _loss_cell),
]


IN_SHORT = frozenset(
    (
        *("trained parameters", "tokens/s per device", "spread"),
        *("peak GiB, allocated (reserved)", "tensors GiB"),
    )
)
"""Columns of the short table, besides the scores."""


def _score_columns(combined: Sequence[Combined]) -> list[Column]:
    """Steps, tokens and held-out metrics, where methods were trained."""
    scores = [result.score for one in combined for result in one.results if result.score]
    if not scores:
        return []
    metrics = dict.fromkeys(name for score in scores for name in score.held_out)
    return [
        ("trained steps", _score_cell(lambda score: f"{score.steps:,}")),
        ("trained tokens", _score_cell(lambda score: f"{score.tokens:,}")),
        *((f"held-out {name}", _score_cell(_metric(name))) for name in metrics),
    ]


def _metric(name: str) -> Callable[[Score], str]:
    form = ".1%" if name == "exact_match" else ".4f"
    return lambda score: format(score.held_out[name], form) if name in score.held_out else NOTHING


def _score_cell(show: Callable[[Score], str]) -> Cell:
    def cell(one: Combined) -> str:
        scores = [result.score for result in one.results if result.score is not None]
        return show(scores[0]) if one.whole and scores else NOTHING

    return cell


def _below(combined: Sequence[Combined]) -> list[str]:
    """What a reader of the numbers must know: formulas, machine, versions, command, notes."""
    ok = [result for one in combined for result in one.results if result.measured is not None]
    lines = []
    if ok:
        formulas = dict.fromkeys(one.measured.flops_formula for one in ok if one.measured)
        lines += [*formulas, ""]
        lines += _origins(ok)
    notes: dict[str, list[str]] = {}
    for one in combined:
        for note in dict.fromkeys(note for result in one.results for note in result.notes):
            notes.setdefault(note, []).append(one.case)
    everyone = len(combined)
    for note, cases in notes.items():
        which = "" if len(cases) == everyone else f" ({', '.join(cases)})"
        lines.append(f"- {_escaped(note)}{which}")
    return lines


def _origins(results: Sequence[CaseResult]) -> list[str]:
    """Machine, versions, commit and command, each of them once."""
    origins = [one.origin for one in results]
    told = [
        *(("Measured on", _facts(origin.hardware)) for origin in origins),
        *(("With", _facts(origin.versions)) for origin in origins),
        *(("Commit", origin.commit or "unknown") for origin in origins),
        *(("Command", f"`{' '.join(origin.command)}`") for origin in origins),
    ]
    runs = max(one.repeat for one in results) + 1
    times = "once" if runs == 1 else f"{runs} times, all cases in turn"
    lines = [f"- {title}: {text}" for title, text in dict.fromkeys(told)]
    return [*lines, f"- Every case ran {times}, in processes of its own"]


def _facts(facts: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())
