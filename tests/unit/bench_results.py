"""Results of a bench that was never run, for tests of what is done with results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dtune.bench.record import CaseResult, Measured, Origin, Score, Status, quantile

HARDWARE = {"device": "cpu", "cpu": "a processor", "cores": "2"}
VERSIONS = {"dtune": "0.1.0", "torch": "2.13.0"}


def measured(seconds: tuple[float, ...] = (0.9, 1.0, 1.1), **changes: Any) -> Measured:
    """Numbers of steps that took these seconds, 1,000 tokens each on two devices."""
    median = quantile(seconds, 0.5)
    plain = Measured(
        step_seconds=seconds,
        slots_per_step=1250,
        tokens_per_step=1000,
        targets_per_step=500,
        devices=2,
        median_seconds=median,
        p10_seconds=quantile(seconds, 0.1),
        p90_seconds=quantile(seconds, 0.9),
        tokens_per_second=1000 / median,
        flops_per_token=2e6,
        flops_formula="FLOPs a token = all of them",
        peak_flops=1e10,
        ceiling_flops=4e9,
        warm_up_seconds=3.0,
        first_step_seconds=2.0,
        load_seconds=1.0,
        peak_allocated_bytes=None,
        peak_reserved_bytes=None,
        peak_rss_bytes=3 << 30,
        base_rss_bytes=1 << 30,
        planned_bytes=int(2.2 * 2**30),
        launches_per_step=321,
        launches_of="operations",
        joules_per_step=None,
        loss_first=5.0,
        loss_last=4.0,
        loss_curve=(5.0, 4.5, 4.0),
        counted_bytes=2 << 30,
    )
    return replace(plain, **changes)


def result(case: str = "peft=lora", numbers: Measured | None = None, **changes: Any) -> CaseResult:
    """A case that was measured, unless ``changes`` say otherwise."""
    plain = CaseResult(
        framework="dtune",
        case=case,
        settings={"peft.name": "lora", "train.micro_batch_size": 2},
        status=Status.ok,
        origin=Origin(
            ("dtune", "bench", "model=tiny"), "2026-01-01T00:00:00+0000", "abc", HARDWARE, VERSIONS
        ),
        measured=numbers or measured(),
        notes=("energy: only NVIDIA GPUs count it",),
    )
    return replace(plain, **changes)


def without_numbers(case: str, status: Status, reason: str) -> CaseResult:
    """A case that was not measured."""
    return result(case, status=status, reason=reason, measured=None, notes=())


SCORE = Score(
    steps=10,
    tokens=4000,
    held_out={"loss": 1.25, "exact_match": 0.5},
    losses=((1, 5.0), (2, 4.0)),
)
