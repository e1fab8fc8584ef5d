"""One contestant measured, and what must hold before a number of it is shown."""

from __future__ import annotations

import importlib.metadata
import statistics
import traceback
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.peers.contestants import Contestant
from benchmarks.peers.inputs import flops_per_token
from benchmarks.peers.watch import Watch
from benchmarks.peers.work import Entry, Work
from dtune.bench.gates import loss_problem
from dtune.bench.origin import origin_of
from dtune.bench.record import CaseResult, Measured, Origin, Status, quantile
from dtune.measure.flops import MFU_FORMULA, peak_flops

NOT_HAD = "no ceiling, plan, launches and energy: `dtune bench` measures them, of dtune alone"


def run_entry(entry: Entry, contestant: Contestant) -> CaseResult:
    """Measure one contestant; whatever goes wrong is its result."""
    torch.set_num_threads(entry.work.threads)
    watch = Watch(entry.work)
    try:
        contestant.run(entry.work, entry.setting, watch)
    except Exception as error:  # noqa: BLE001 - peers raise anything; it is their row
        # Only now: it would add to the memory of who is measured.
        from dtune.out_of_memory import is_out_of_memory

        traceback.print_exc()
        status = Status.oom if is_out_of_memory(error) else Status.failed
        return result_of(entry, contestant, status, reason=first_line(error))
    if problem := gate(watch):
        return result_of(entry, contestant, Status.refused, reason=problem)
    return result_of(entry, contestant, Status.ok, watch=watch)


def _peak(work: Work) -> float | None:
    """FLOP/s of the device by its data sheet, which is that of bf16; None where it is not known."""
    if work.device != "cuda" or work.precision != "bf16":
        return None
    return peak_flops(torch.cuda.get_device_name())


def first_line(error: BaseException) -> str:
    """What went wrong, on one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


def gate(watch: Watch) -> str:
    """Why the numbers of a run must not be shown; empty where it has learned."""
    work = watch.work
    if len(watch.losses) != work.total_steps:
        return f"{len(watch.losses)} optimizer steps were done instead of {work.total_steps}"
    if watch.gradient_problems:
        return watch.gradient_problems[0]
    if not watch.gradients_seen:
        return "no gradient of an adapter was seen"
    if problem := loss_problem(torch.stack(watch.losses).tolist()):
        return problem
    if len(set(watch.graphs)) != 1:
        return "torch.compile was still at work in timed steps; raise warmup"
    return ""


def result_of(
    entry: Entry,
    contestant: Contestant,
    status: Status,
    *,
    reason: str = "",
    watch: Watch | None = None,
) -> CaseResult:
    """The entry's line in the file of results."""
    notes: tuple[str, ...] = ()
    if watch is not None:
        computed = statistics.median(watch.cpu_seconds())
        notes = (f"{computed:.4f} s of CPU time in a step (median)", NOT_HAD)
    return CaseResult(
        framework=entry.peer,
        case=entry.case,
        settings=entry.settings(),
        status=status,
        origin=origin(entry.work, contestant.PACKAGES),
        reason=reason,
        measured=None if watch is None else measured(watch),
        notes=notes,
    )


def measured(watch: Watch) -> Measured:
    """The numbers of a run that has passed the gate."""
    work, seconds = watch.work, watch.step_seconds()
    losses = torch.stack(watch.losses).tolist()
    median = statistics.median(seconds)
    return Measured(
        step_seconds=seconds,
        slots_per_step=work.tokens_per_step,
        tokens_per_step=work.tokens_per_step,
        targets_per_step=work.rows * (work.length - work.documents),
        devices=1,
        median_seconds=median,
        p10_seconds=quantile(seconds, 0.1),
        p90_seconds=quantile(seconds, 0.9),
        tokens_per_second=work.tokens_per_step / median,
        flops_per_token=flops_per_token(work),
        flops_formula=MFU_FORMULA,
        peak_flops=_peak(work),
        ceiling_flops=None,
        warm_up_seconds=watch.warm_up_seconds,
        first_step_seconds=watch.first_step_seconds,
        load_seconds=watch.load_seconds,
        peak_allocated_bytes=watch.peaks.allocated,
        peak_reserved_bytes=watch.peaks.reserved,
        peak_rss_bytes=watch.peaks.rss,
        base_rss_bytes=watch.peaks.base_rss,
        planned_bytes=None,
        launches_per_step=None,
        launches_of="",
        joules_per_step=None,
        loss_first=losses[0],
        loss_last=losses[-1],
        loss_curve=tuple(losses),
    )


def origin(work: Work, packages: Sequence[str]) -> Origin:
    """Hardware, versions, command, commit and time."""
    found = origin_of(["python", "-m", "benchmarks.peers.worker"], devices=1)
    own = {name: version(name) for name in packages}
    versions = {**found.versions, **{name: known for name, known in own.items() if known}}
    return replace(found, versions=versions)


def version(package: str) -> str:
    """Of a distribution; empty where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
