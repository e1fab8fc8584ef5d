"""The objective of a sweep against each of its keys."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtune.errors import ConfigError
from dtune.runtime.capabilities import require
from dtune.sweep.standing import DONE, PRUNED, Standing, SweepView

_COLUMNS = 3
_ROWS_ON_A_LOG_AXIS = 3


def draw(view: SweepView, out: Path) -> list[Path]:
    """Write the plot as PNG and SVG beside each other; their paths.

    One panel a key: numbers on an axis, logarithmic where they are spaced so, words as strips.
    ConfigError where no trial has a value, or matplotlib is not installed.
    """
    require("matplotlib", "dtune sweep plot")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [one for one in view.look() if one.value is not None and one.state in (DONE, PRUNED)]
    if not shown:
        raise ConfigError(f"no trial in {view.folder} has a value yet; nothing to draw")
    keys = list(view.record.swept) or [""]
    columns = min(_COLUMNS, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, 3.2 * rows), squeeze=False, sharey=True
    )
    for key, panel in zip(keys, panels.flat, strict=False):
        _draw_key(panel, key, view.record.swept.get(key, ""), shown)
    for panel in panels.flat[len(keys) :]:
        panel.set_visible(False)
    for row in panels:
        row[0].set_ylabel(view.record.objective.title)
    figure.suptitle(f"{view.folder.name}: {len(shown)} trials")
    figure.tight_layout()
    files = [out.with_suffix(".png"), out.with_suffix(".svg")]
    out.parent.mkdir(parents=True, exist_ok=True)
    for file in files:
        figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return files


def _draw_key(panel: Any, key: str, values: str, shown: Sequence[Standing]) -> None:
    texts = [one.settings.get(key, "") for one in shown]
    numbers = numbers_of(texts)
    if numbers is None:
        words = list(dict.fromkeys(texts))
        places: Sequence[float] = [words.index(text) for text in texts]
        panel.set_xticks(range(len(words)), words, rotation=30 if len(words) > 3 else 0)
        panel.margins(x=0.2)
    else:
        places = numbers
        if is_log_spaced(numbers, values):
            panel.set_xscale("log")
    for state, marker, colour in ((DONE, "o", "tab:blue"), (PRUNED, "x", "tab:gray")):
        chosen = [index for index, one in enumerate(shown) if one.state == state]
        if chosen:
            panel.scatter(
                [places[index] for index in chosen],
                [shown[index].value for index in chosen],
                marker=marker,
                color=colour,
                alpha=0.8,
                label=state,
            )
    panel.set_xlabel(key)
    if any(one.state == PRUNED for one in shown):
        panel.legend(fontsize="small")


def numbers_of(texts: Sequence[str]) -> list[float] | None:
    """The texts as numbers; None where one is no number."""
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        return None
    return numbers if all(math.isfinite(number) for number in numbers) else None


def is_log_spaced(numbers: Sequence[float], values: str) -> bool:
    """Whether an axis of these belongs in logarithms: tagged so, or the steps grow with them."""
    if values.replace(" ", "").startswith("tag(log,"):
        return min(numbers) > 0
    points = sorted(set(numbers))
    if len(points) < _ROWS_ON_A_LOG_AXIS or points[0] <= 0:
        return False
    ratios = [b / a for a, b in itertools.pairwise(points)]
    steps = [b - a for a, b in itertools.pairwise(points)]
    return max(ratios) / min(ratios) < max(steps) / min(steps)
