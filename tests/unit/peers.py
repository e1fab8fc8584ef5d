"""Results of a comparison as its tests need them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.options import SETTINGS, parse
from benchmarks.peers.work import Entry
from dtune.bench.record import CaseResult, Measured, Origin, Status, quantile

MIB = 1024**2


def result(
    who: str,
    *,
    seconds: Sequence[float] = (1.0, 2.0, 3.0),
    peak_mib: int = 100,
    losses: Sequence[float] = (6.0, 5.0),
    model: str = "tiny",
    setting: str = "plain",
    repeat: int = 0,
    reason: str = "",
) -> CaseResult:
    """A run with these numbers, or refused for a reason."""
    work = parse([]).work(model, Path("folder"), has_gpu=False)
    entry = Entry(who, SETTINGS[setting], work)
    return CaseResult(
        framework=who,
        case=entry.case,
        settings=entry.settings(),
        status=Status.refused if reason else Status.ok,
        origin=Origin(("python", "-m", "x"), "2026-01-01", "abc", {"cpu": "c"}, {"torch": "2"}),
        reason=reason,
        repeat=repeat,
        measured=None if reason else _measured(seconds, peak_mib, losses),
    )


def _measured(seconds: Sequence[float], peak_mib: int, losses: Sequence[float]) -> Measured:
    median = quantile(seconds, 0.5)
    return Measured(
        step_seconds=tuple(seconds),
        slots_per_step=1000,
        tokens_per_step=1000,
        targets_per_step=998,
        devices=1,
        median_seconds=median,
        p10_seconds=quantile(seconds, 0.1),
        p90_seconds=quantile(seconds, 0.9),
        tokens_per_second=1000 / median,
        flops_per_token=1.0,
        flops_formula="",
        peak_flops=None,
        ceiling_flops=None,
        warm_up_seconds=1.0,
        first_step_seconds=1.0,
        load_seconds=1.0,
        peak_allocated_bytes=None,
        peak_reserved_bytes=None,
        peak_rss_bytes=peak_mib * MIB,
        base_rss_bytes=10 * MIB,
        planned_bytes=None,
        launches_per_step=None,
        launches_of="",
        joules_per_step=None,
        loss_first=losses[0],
        loss_last=losses[-1],
        loss_curve=tuple(losses),
    )
