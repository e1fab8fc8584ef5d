"""The end of a run: the exported weights, result.json, report.md and the closing table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dtune.checkpoint.layout import naming, step_name
from dtune.checkpoint.reader import CHECKPOINTS, CheckpointSource, open_whole
from dtune.measure.flops import MFU_FORMULA
from dtune.measure.memory import peak_memory_gib
from dtune.runtime.logs import log
from dtune.runtime.status import State
from dtune.train.export import Exporter
from dtune.train.sinks.background import TrackerReport
from dtune.train.sinks.build import report_trackers
from dtune.train.trainer import Trainer


@dataclass(frozen=True)
class Result:
    """What a run comes to; contents of result.json."""

    state: str
    steps: int
    total_steps: int
    before: Mapping[str, float]
    """First evaluation, by metric."""
    after: Mapping[str, float]
    """Last evaluation, by metric."""
    best_step: int
    tokens: int
    targets: int
    tokens_per_second: float
    targets_per_second: float
    mfu: float | None
    """Share of the devices' peak; null where that is not known."""
    peak_memory_gib: float
    training_seconds: float
    excluded_seconds: Mapping[str, float]
    """Not in tokens per second: warm-up, evaluate, save."""
    export: str
    """Folder of the adapter or model; empty where the run was stopped before its end."""
    best_export: str
    """Folder of the weights of the best step, where that is not the last."""
    skips: int
    """Bad steps that the guard has skipped."""
    rollbacks: int
    """Times that the guard has gone back to a checkpoint."""
    left_out: list[int]
    """Steps that it has left out then."""
    trackers: list[TrackerReport]
    """Rows that TensorBoard or wandb did not take, and why."""


def finish_run(trainer: Trainer, state: State, exporter: Exporter, *, title: str) -> Result:
    """Export what was trained and write the report; collective.

    A preempted run exports nothing: it goes on later.
    """
    folder, progress = trainer.run_dir, trainer.progress
    exported = best_exported = ""
    if state is State.done:
        exported = str(folder / exporter.name)
        exporter.export(Path(exported))
        if 0 < progress.best_step != progress.step:
            best_exported = _export_best(trainer, exporter)
    result = _collect(trainer, state, exported, best_exported)
    if trainer.world.is_first:
        with naming(folder):
            (folder / "result.json").write_text(json.dumps(asdict(result), indent=1) + "\n")
            (folder / "report.md").write_text(_report(result, title, folder), encoding="utf-8")
        log.info("\n%s", _table(result, title, folder))
    return result


def _export_best(trainer: Trainer, exporter: Exporter) -> str:
    """Export the best step; the folder, or nothing where its checkpoint is not whole any more."""
    path = trainer.run_dir / CHECKPOINTS / step_name(trainer.progress.best_step)
    best, damage = open_whole(path, trainer.world)
    if best is None:
        # The last step is exported: what was trained is there.
        log.warning("the best step is not exported: %s", "; ".join(damage))
        return ""
    trainer.engine.load_state(CheckpointSource(best), best.scalars)
    folder = trainer.run_dir / f"best-{exporter.name}"
    exporter.export(folder)
    return str(folder)


def _collect(trainer: Trainer, state: State, exported: str, best_exported: str) -> Result:
    meter, progress = trainer.meter, trainer.progress
    return Result(
        state=state.value,
        steps=progress.step,
        total_steps=trainer.total_steps,
        before=progress.first_evaluation,
        after=progress.last_evaluation,
        best_step=progress.best_step,
        tokens=progress.tokens,
        targets=progress.targets,
        tokens_per_second=meter.tokens_per_second,
        targets_per_second=meter.targets_per_second,
        mfu=trainer.speed.mfu(meter.tokens_per_second, meter.targets_per_second),
        peak_memory_gib=peak_memory_gib(trainer.world.device),
        training_seconds=meter.seconds,
        excluded_seconds=meter.excluded,
        export=exported,
        best_export=best_exported,
        skips=progress.guard.skips,
        rollbacks=progress.guard.rollbacks,
        left_out=progress.guard.left_out,
        trackers=report_trackers(trainer.sinks),
    )


def _rows(result: Result, folder: Path) -> list[tuple[str, str]]:
    rows = [("steps", f"{result.steps} of {result.total_steps}")]
    for metric in result.after:
        before, after = result.before.get(metric), result.after[metric]
        start = "-" if before is None else _number(metric, before)
        rows.append((f"held-out {metric}", f"{start} -> {_number(metric, after)}"))
    rows.append(
        (
            "tokens/s",
            f"{result.tokens_per_second:,.0f} all, {result.targets_per_second:,.0f} trained"
            if result.training_seconds
            else "not measured: no step after the warm-up",
        )
    )
    if result.mfu is not None:
        rows.append(("MFU", f"{result.mfu:.1%}"))
    apart = ", ".join(
        f"{name} {seconds:.1f} s" for name, seconds in result.excluded_seconds.items()
    )
    rows.append(("training", f"{result.training_seconds:.1f} s; apart: {apart or 'nothing'}"))
    rows.append(("peak memory", f"{result.peak_memory_gib:.2f} GiB"))
    if result.export:
        rows.append(("weights", result.export))
    else:
        rows.append(("to go on", f"the same command with run_dir={folder} resume=auto"))
    guard = result.skips + result.rollbacks
    if guard:
        rows.append(("bad steps", f"{result.skips} skipped, {result.rollbacks} rollbacks"))
    rows.extend(
        (tracker.name, f"{tracker.dropped} rows dropped: {tracker.error}")
        for tracker in result.trackers
        if tracker.error
    )
    if result.best_export:
        rows.append((f"best (step {result.best_step})", result.best_export))
    rows.append(("report", str(folder / "report.md")))
    rows.append(("metrics", str(folder / "metrics.jsonl")))
    return rows


def _number(metric: str, value: float) -> str:
    return f"{value:.1%}" if metric == "exact_match" else f"{value:.4f}"


def _table(result: Result, title: str, folder: Path) -> str:
    rows = _rows(result, folder)
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    rule = "-" * max(len(title), *(len(line) for line in lines))
    return "\n".join([title, rule, *lines])


def _report(result: Result, title: str, folder: Path) -> str:
    table = "\n".join(f"| {name} | {value} |" for name, value in _rows(result, folder))
    formula = f"\nMFU = {MFU_FORMULA}.\n" if result.mfu is not None else ""
    return (
        f"# {title}\n\nState: {result.state}\n\n| | |\n|---|---|\n{table}\n{formula}\n"
        "Tokens per second count training alone; what is listed apart is not in it. "
        "Config: config.yaml. Versions, hardware and command: env.json.\n"
    )
