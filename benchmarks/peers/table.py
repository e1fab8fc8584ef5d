"""The table of a file of results: ``python -m benchmarks.peers.table FILE.jsonl``.

``python -m benchmarks.peers.table PAGE.md`` writes the tables of a page anew, which stand between
``<!-- peers: FILE.jsonl -->`` and ``<!-- end of peers -->``.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.contestants import MODULES, find
from benchmarks.peers.options import SETTINGS
from dtune.bench.pages import rewrite
from dtune.bench.record import CaseResult, Measured, quantile, read_jsonl
from dtune.errors import ConfigError

MIB = 1024**2
MARK = "peers"
_OF_SETTING = ("recompute", "best")
_HEAD = (
    "| setting | who | step ms (p10 to p90) | between rounds | tokens/s | peak MiB | loss "
    "| time: dtune / it | memory: dtune / it |"
)


@dataclass(frozen=True)
class Row:
    """All rounds of one contestant in one setting."""

    setting: str
    who: str
    runs: tuple[Measured, ...]
    reason: str
    """Why there is no number; empty where there is."""

    @property
    def steps(self) -> list[float]:
        """Every timed step of all rounds, in seconds."""
        return [seconds for run in self.runs for seconds in run.step_seconds]

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.steps)

    @property
    def spread(self) -> float:
        """How far the medians of rounds lie apart, as a share of the median."""
        medians = [run.median_seconds for run in self.runs]
        return (max(medians) - min(medians)) / self.median

    @property
    def peak_bytes(self) -> int:
        """Largest of all rounds: of the device where it has memory of its own, else resident."""
        return max(run.peak_bytes or 0 for run in self.runs)


def setting_of(result: CaseResult) -> str:
    """Name of the setting that a run had."""
    (name,) = (
        name
        for name, setting in SETTINGS.items()
        if all(result.settings[key] == vars(setting)[key] for key in _OF_SETTING)
    )
    return name


def rows_of(results: Iterable[CaseResult]) -> list[Row]:
    """Rows of one work, in the order of settings and contestants."""
    groups: dict[tuple[str, str], list[CaseResult]] = {}
    for result in results:
        groups.setdefault((setting_of(result), result.framework), []).append(result)
    order = sorted(
        groups, key=lambda key: (list(SETTINGS).index(key[0]), list(MODULES).index(key[1]))
    )
    rows = []
    for setting, who in order:
        runs = groups[setting, who]
        bad = next((run.reason for run in runs if run.measured is None), "")
        measured = tuple(run.measured for run in runs if run.measured is not None)
        # One bad run takes the number away from all: what is left would be the lucky ones.
        rows.append(Row(setting, who, () if bad else measured, bad))
    return rows


def markdown(results: Sequence[CaseResult]) -> str:
    """A table for each work, with what it is, where and by which command."""
    works: dict[str, list[CaseResult]] = {}
    for result in results:
        own = {key: value for key, value in result.settings.items() if key not in _OF_SETTING}
        works.setdefault(json.dumps(own, sort_keys=True), []).append(result)
    parts = [part for group in works.values() for part in _section(group)]
    return "\n".join([*parts, *_origin(results), ""])


def _section(results: Sequence[CaseResult]) -> Iterator[str]:
    s = results[0].settings
    yield f"### {s['model']}"
    yield ""
    yield (
        f"{s['device']}, {s['precision']}, LoRA of rank {s['rank']} on all linears, "
        f"{s['accumulation']} x {s['micro_batch']} packed rows of {s['length']} tokens "
        f"({s['documents']} documents each), AdamW, threads: {s['threads']}, "
        f"{s['timed_steps']} timed steps after {s['warmup_steps']} a run."
    )
    yield ""
    yield _HEAD
    yield "|---|---|---:|---:|---:|---:|---|---:|---:|"
    rows = rows_of(results)
    own = {row.setting: row for row in rows if row.who == "dtune" and row.runs}
    for row in rows:
        yield _line(row, own.get(row.setting))
    yield ""


def _line(row: Row, own: Row | None) -> str:
    title = find(row.who).TITLE
    if not row.runs:
        return f"| {row.setting} | {title} | no number: {row.reason} | | | | | | |"
    last = row.runs[-1]
    low, high = quantile(row.steps, 0.1), quantile(row.steps, 0.9)
    base = max(run.base_rss_bytes or 0 for run in row.runs)
    peak = f"{row.peak_bytes / MIB:.0f}"
    if last.peak_allocated_bytes is None:
        peak += f" ({base / MIB:.0f} of them libraries)"
    elif last.peak_reserved_bytes is not None:
        peak += f" ({last.peak_reserved_bytes / MIB:.0f} reserved)"
    cells = [
        row.setting,
        title,
        f"{1e3 * row.median:.1f} ({1e3 * low:.1f} to {1e3 * high:.1f})",
        f"{row.spread:.1%}",
        f"{last.tokens_per_step / row.median:,.0f}",
        peak,
        f"{last.loss_first:.4f} to {last.loss_last:.4f}",
        *_ratios(row, own),
    ]
    return f"| {' | '.join(cells)} |"


def _ratios(row: Row, own: Row | None) -> tuple[str, str]:
    if own is None or row.who == "dtune":
        return "", ""
    return f"{own.median / row.median:.3f}", f"{own.peak_bytes / row.peak_bytes:.3f}"


def _origin(results: Sequence[CaseResult]) -> Iterator[str]:
    first = results[0].origin
    versions: dict[str, str] = {}
    for result in results:
        versions.update(result.origin.versions)
    yield f"    {' '.join(first.command)}"
    yield ""
    yield f"- {', '.join(f'{name}: {value}' for name, value in first.hardware.items())}"
    yield f"- {', '.join(f'{name} {value}' for name, value in sorted(versions.items()))}"
    yield f"- commit {first.commit or 'unknown'}, begun {first.started}"


def main(argv: Sequence[str]) -> int:
    """Print the tables of files of results, and write those of pages anew; the exit code."""
    try:
        for name in argv:
            if name.endswith(".md"):
                rewrite(Path(name), MARK, markdown)
            else:
                print(markdown(read_jsonl(Path(name))))
    except ConfigError as error:
        sys.stderr.write(f"peers: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
