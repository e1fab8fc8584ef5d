"""Tokens per second, memory and loss of every case, drawn: PNG and SVG beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from dtune.bench.record import GIB, CaseResult
from dtune.bench.table import Combined, combine
from dtune.errors import ConfigError
from dtune.runtime.capabilities import require

NAMES = ("tokens_per_second", "memory", "loss")
"""Files, without their endings."""

_BAR_INCHES = 0.34
_WIDTH_INCHES = 7.5


def draw(results: Sequence[CaseResult], out: Path) -> list[Path]:
    """Write one picture a quantity into a folder; the paths of the files.

    Raises:
        ConfigError: No case gave numbers, or matplotlib is not installed.
    """
    require("matplotlib", "bench.plots=true")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [one for one in combine(results) if one.whole]
    if not cases:
        raise ConfigError("no case gave numbers; there is nothing to draw")
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, fill in zip(NAMES, (_draw_rates, _draw_memory, _draw_losses), strict=True):
        height = 4.5 if fill is _draw_losses else 1.4 + _BAR_INCHES * len(cases)
        figure, panel = pyplot.subplots(figsize=(_WIDTH_INCHES, height))
        fill(panel, cases)
        figure.tight_layout()
        for ending in ("png", "svg"):
            files.append(out / f"{name}.{ending}")
            figure.savefig(files[-1], dpi=150)
        pyplot.close(figure)
    return files


def name_of(one: Combined) -> str:
    """A case as a plot names it."""
    return one.case if one.framework == "dtune" else f"{one.framework}: {one.case}"


def _draw_rates(panel: Any, cases: Sequence[Combined]) -> None:
    """Bars of tokens/s per device, with the spread of their runs."""
    rates = [one.tokens_per_second / one.measured[0].devices for one in cases]
    errors = [rate * one.spread for rate, one in zip(rates, cases, strict=True)]
    panel.barh([name_of(one) for one in cases], rates, xerr=errors, color="tab:blue")
    panel.invert_yaxis()
    panel.set_xlabel("tokens/s per device, padding not counted")


def _draw_memory(panel: Any, cases: Sequence[Combined]) -> None:
    """Bars of the measured peak, and a mark where the plan put it."""
    of_device = all(one.measured[0].peak_allocated_bytes is not None for one in cases)
    sizes = {name_of(one): _tensor_gib(one) for one in cases}
    shown = {name: size for name, size in sizes.items() if size is not None}
    panel.barh(list(shown), list(shown.values()), color="tab:green", label="measured")
    planned = {name_of(one): size / GIB for one in cases if (size := one.measured[0].planned_bytes)}
    if planned:
        panel.plot(
            list(planned.values()),
            list(planned),
            linestyle="none",
            marker="|",
            markersize=14,
            color="black",
            label="planned",
        )
    panel.invert_yaxis()
    panel.set_xlabel(f"GiB at the peak, {'allocated on a device' if of_device else 'tensors'}")
    if shown or planned:
        panel.legend(fontsize="small")


def _tensor_gib(one: Combined) -> float | None:
    """The median of the repeats; None where one is not known."""
    sizes = [each.tensor_bytes for each in one.measured]
    known = [size for size in sizes if size is not None]
    return median(known) / GIB if len(known) == len(sizes) else None


def _draw_losses(panel: Any, cases: Sequence[Combined]) -> None:
    """Training loss by step where methods were trained, else the loss on the fixed batch."""
    scored = [(one, score) for one in cases if (score := one.results[0].score) is not None]
    for one, score in scored:
        steps, losses = zip(*score.losses, strict=True)
        panel.plot(steps, losses, label=name_of(one), linewidth=1)
    for one in [] if scored else cases:
        curve = one.measured[0].loss_curve
        panel.plot(range(1, len(curve) + 1), curve, label=name_of(one), linewidth=1)
    panel.set_xlabel("optimizer step")
    panel.set_ylabel("training loss" if scored else "loss on the fixed batch")
    panel.legend(fontsize="x-small", ncols=2)
