"""The course of a case: plan, ceiling, build, warm-up, timed steps, gates."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from dtune.bench.ceiling import measure_ceiling
from dtune.bench.energy import EnergyMeter, total_joules
from dtune.bench.gates import GradientProbe, falls, loss_problem
from dtune.bench.launches import Launches, count_launches
from dtune.bench.memory import PeakMeter, Peaks, count_tensors
from dtune.bench.planned import Planned, plan_case
from dtune.bench.record import Measured
from dtune.bench.schema import BenchConfig
from dtune.bench.subject import Subject, build_subject, prepared_run
from dtune.bench.timing import (
    StepTimes,
    WarmUp,
    compiled_graphs,
    synchronize,
    time_steps,
    warm_up,
)
from dtune.config.run import RunConfig
from dtune.config.support import check_run
from dtune.measure.flops import FLOPS_FORMULA
from dtune.parallel.base import COMPUTE_DTYPES
from dtune.plan.auto import decide_here
from dtune.runtime.seed import seed_everything
from dtune.runtime.world import World
from dtune.train.step import count_tokens

T = TypeVar("T", int, float)

FORMULA = (
    f"{FLOPS_FORMULA}; MFU = tokens/s per device x FLOPs a token / peak of the data sheet, share "
    "of the ceiling = the same / FLOP/s of the model's own products measured before in the same "
    "process"
)
_LOOK_EVERY = 5
_OVERFLOWS = 10


@dataclass(frozen=True)
class Outcome:
    """What a case came to; either numbers, or why there are none."""

    measured: Measured | None
    refusal: str
    notes: tuple[str, ...]


def measure_case(run: RunConfig, bench: BenchConfig, world: World) -> Outcome:
    """Measure one case on all ranks; collective. Every rank returns the same."""
    asked = prepared_run(run, bench)
    run = decide_here(asked, world)
    check_run(run, world.size)
    planned = plan_case(run, bench, world)
    ceiling = _ceiling(run, bench, planned, world)
    seed_everything(run.seed, world.rank)
    peaks = PeakMeter(world.device)
    began = time.perf_counter()
    subject = build_subject(run, bench, world)
    synchronize(world.device)
    load_seconds = time.perf_counter() - began
    passage = _run_steps(subject, bench, peaks)
    launches, launch_notes = _launches(subject)
    counted = count_tensors(subject.step) if world.device.type == "cpu" else None
    problem = _gradient_problem(subject)
    _go_on_until_it_falls(subject, bench.falls_within)
    curve = subject.loss_curve()
    still = "torch.compile was still at work in timed steps; raise bench.warm_up"
    refusal = problem or loss_problem(curve) or (still if passage.compiled else "")
    chosen = () if run == asked else (f"chosen by auto: {_chosen(run)}",)
    notes = (*chosen, *planned.notes, *subject.notes, *passage.notes, *launch_notes)
    measured = None
    if not refusal:
        watched = _Watched(planned, ceiling, load_seconds, launches, counted, curve)
        measured = _collect(subject, passage, watched)
    return Outcome(measured, refusal, notes)


def _chosen(run: RunConfig) -> str:
    return f"parallel={run.parallel.name}, train.recompute={run.train.recompute.value}"


@dataclass(frozen=True)
class _Passage:
    """Warm-up and timed steps of this rank, and what was watched meanwhile."""

    warm_up: WarmUp
    times: StepTimes
    peaks: Peaks
    joules: float | None
    notes: tuple[str, ...]
    compiled: bool
    """Whether a timed step has compiled something, on any rank."""


def _run_steps(subject: Subject, bench: BenchConfig, peaks: PeakMeter) -> _Passage:
    world = subject.world
    warm = warm_up(subject.step, steps=bench.warm_up, device=world.device, any_rank=world.any_says)
    energy = EnergyMeter(world.device)
    gc.collect()
    world.barrier()
    energy.start()
    graphs = compiled_graphs()
    times = time_steps(subject.step, steps=bench.steps, device=world.device)
    joules = energy.joules()
    compiled = world.any_says(compiled_graphs() != graphs)
    notes = [*peaks.notes, *([energy.why_not] if energy.why_not else [])]
    return _Passage(warm, times, peaks.read(), joules, tuple(notes), compiled)


def _ceiling(run: RunConfig, bench: BenchConfig, planned: Planned, world: World) -> float | None:
    """FLOP/s of a device, a mean over those of the run, all of which are busy; None: not asked."""
    if not bench.ceiling_seconds:
        return None
    world.barrier()
    ceiling = measure_ceiling(
        planned.shapes,
        rows=run.train.micro_batch_size * run.data.max_length,
        dtype=COMPUTE_DTYPES[run.precision.name],
        device=world.device,
        seconds=bench.ceiling_seconds,
    )
    rates = world.gather(ceiling.flops)
    return sum(rates) / len(rates)


def _launches(subject: Subject) -> tuple[Launches | None, tuple[str, ...]]:
    """Count a step. What blocks compiled for a CPU dispatch cannot be seen."""
    if subject.run.train.compile and subject.world.device.type != "cuda":
        return None, ("launches a step: not counted in compiled blocks on a CPU",)
    launches = count_launches(subject.step, subject.world.device)
    if not launches.count:
        return None, ("launches a step: torch's profiler saw none; CUPTI may be missing",)
    return launches, ()


def _gradient_problem(subject: Subject) -> str:
    """Look at the gradients of one step; fp16 may first have to lower the scale of its loss."""
    for _ in range(_OVERFLOWS):
        skipped = subject.engine.skipped_steps
        probe = GradientProbe(subject.engine, subject.world)
        with probe:
            subject.step()
        if subject.engine.skipped_steps == skipped:
            break
    return probe.problem()


def _go_on_until_it_falls(subject: Subject, within: int) -> None:
    """Train on until the loss of the fixed batch is below its first, or ``within`` steps are done.

    Ranks have the same losses, and so do the same.
    """
    while subject.done < within and not falls(subject.loss_curve()):
        for _ in range(min(_LOOK_EVERY, within - subject.done)):
            subject.step()


@dataclass(frozen=True)
class _Watched:
    """What was found out before and after the timed steps."""

    planned: Planned
    ceiling: float | None
    load_seconds: float
    launches: Launches | None
    counted: int | None
    curve: tuple[float, ...]


def _collect(subject: Subject, passage: _Passage, watched: _Watched) -> Measured:
    """Put the numbers of all ranks together; collective."""
    world, warm = subject.world, passage.warm_up
    planned, launches, curve = watched.planned, watched.launches, watched.curve
    times = StepTimes(tuple(map(max, zip(*world.gather(passage.times.seconds), strict=True))))
    targets, tokens, slots = world.sum(count_tokens(subject.batches).to(world.device)).tolist()
    peaks = world.gather(passage.peaks)
    peak = subject.speed.peak_flops
    return Measured(
        step_seconds=times.seconds,
        slots_per_step=slots,
        tokens_per_step=tokens,
        targets_per_step=targets,
        devices=world.size,
        median_seconds=times.median,
        p10_seconds=times.p10,
        p90_seconds=times.p90,
        tokens_per_second=tokens / times.median,
        flops_per_token=subject.speed.flops_per_token(targets / tokens),
        flops_formula=FORMULA,
        peak_flops=None if peak is None else peak / world.size,
        ceiling_flops=watched.ceiling,
        warm_up_seconds=max(world.gather(warm.seconds)),
        first_step_seconds=max(world.gather(warm.first_seconds)),
        load_seconds=max(world.gather(watched.load_seconds)),
        peak_allocated_bytes=_most([one.allocated for one in peaks]),
        peak_reserved_bytes=_most([one.reserved for one in peaks]),
        peak_rss_bytes=_most([one.rss for one in peaks]),
        base_rss_bytes=_most([one.base_rss for one in peaks]),
        planned_bytes=planned.memory,
        launches_per_step=None if launches is None else launches.count,
        launches_of="" if launches is None else launches.of,
        joules_per_step=_per_step(total_joules(world.gather(passage.joules)), times),
        loss_first=curve[0],
        loss_last=curve[-1],
        loss_curve=curve,
        parameters=planned.parameters,
        trained_parameters=planned.trained,
        counted_bytes=_most(world.gather(watched.counted)),
    )


def _most(values: Sequence[T | None]) -> T | None:
    """The largest; None where one is not known."""
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def _per_step(joules: float | None, times: StepTimes) -> float | None:
    return None if joules is None else joules / len(times.seconds)
