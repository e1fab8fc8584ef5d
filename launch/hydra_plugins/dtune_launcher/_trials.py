"""What the launcher does. The underscore keeps Hydra from importing this where it only looks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtune_launch.gpus import count_cores, resolve_nproc, visible_gpus
from dtune_launch.local import exit_code, forwarding_signals, start_job
from dtune_launch.spec import JobSpec
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from omegaconf import DictConfig, open_dict

from dtune.checkpoint.schema import Best
from dtune.commands.train import describe_launch
from dtune.config.freeze import freeze, load_frozen
from dtune.config.run import RunConfig
from dtune.config.support import check_run
from dtune.errors import ConfigError
from dtune.run_folder import start_run_folder
from dtune.runtime.status import EXIT_CODES, State, read_status

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Trial:
    """One point of a sweep, composed and checked."""

    number: int
    overrides: tuple[str, ...]
    label: str
    """The overrides that differ between trials."""
    run: RunConfig
    text: str
    """The frozen config."""
    composed: DictConfig
    nproc: int

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.run_dir)


@dataclass(frozen=True)
class Scores:
    """What metrics.jsonl says. Numbers are None where the trial did not get that far."""

    loss: float | None = None
    """On held-out rows, of the best evaluation after the start."""
    exact_match: float | None = None
    """Of the same evaluation."""
    train_loss: float | None = None
    """Of the last step that was logged."""


@dataclass(frozen=True)
class Outcome:
    """What a trial came to."""

    state: State
    message: str
    seconds: float
    scores: Scores
    tokens_per_second: float | None


class TrialFailed(SystemExit, RuntimeError):
    """Raised by Hydra where it reads the result of a failed trial.

    A sweeper may catch it, as an error; uncaught it ends dtune with its exit code, without a
    traceback: the table has told what failed.
    """


def plan_trials(
    config: DictConfig,
    job_overrides: Sequence[Sequence[str]],
    *,
    first_number: int,
    loader: ConfigLoader,
    parallel: int,
) -> list[Trial]:
    """Compose, freeze and check every trial; ConfigError names the first that is wrong."""
    if parallel < 1:
        raise ConfigError(f"hydra.launcher.parallel={parallel} must be at least 1")
    share = _gpus_of_slot(0, parallel)
    wanted = [tuple(filter_overrides(overrides)) for overrides in job_overrides]
    labels = _labels(wanted)
    trials = []
    for number, overrides in enumerate(job_overrides, first_number):
        index = number - first_number
        composed = _compose(config, overrides, number, loader)
        try:
            text = freeze(composed)
            run = load_frozen(text)
            nproc = resolve_nproc(run.launch, engine=run.parallel.name, gpus=len(share))
            _check_share(nproc, share, parallel)
            check_run(run, nproc)
        except ConfigError as error:
            raise ConfigError(f"trial {number} ({labels[index]}): {error}") from error
        trials.append(Trial(number, wanted[index], labels[index], run, text, composed, nproc))
    return trials


def _compose(
    config: DictConfig, overrides: Sequence[str], number: int, loader: ConfigLoader
) -> DictConfig:
    """The config of one trial, its run folder inside the sweep's."""
    if any(override.lstrip("+").startswith("run_dir=") for override in overrides):
        raise ConfigError("a sweep names the folders of its trials; set hydra.sweep.dir instead")
    composed = loader.load_sweep_config(config, list(overrides))
    with open_dict(composed):
        composed.hydra.job.id = str(number)
        composed.hydra.job.num = number
    HydraConfig.instance().set_config(composed)
    run_dir = Path(str(composed.hydra.sweep.dir), str(composed.hydra.sweep.subdir))
    with open_dict(composed):
        del composed["hydra"]
        composed.run_dir = str(run_dir)
    return composed


def _labels(wanted: Sequence[tuple[str, ...]]) -> list[str]:
    """For each trial what it does not share with all others; everything where there is one."""
    shared = set[str]().union(*wanted) if len(wanted) > 1 else set()
    for overrides in wanted:
        shared &= set(overrides)
    labels = [" ".join(item for item in items if item not in shared) for items in wanted]
    # Hydra escapes what its grammar knows, "dtune\\://"; people read it plain.
    return [re.sub(r"\\(.)", r"\1", label) for label in labels]


def start_folders(trials: Sequence[Trial]) -> None:
    """Make every run folder; ConfigError if one holds something, before any trial starts."""
    for trial in trials:
        command = ["dtune", "train", *trial.overrides, f"run_dir={trial.folder}"]
        start_run_folder(trial.run, trial.text, command=command)


def run_trials(trials: Sequence[Trial], *, parallel: int) -> list[JobReturn]:
    """Run the trials, at most ``parallel`` at once; a line as each ends and a table at the end.

    A trial that fails stops no other. A signal stops those that run and starts no further one.
    """
    waiting = list(trials)
    running: dict[int, _Running] = {}
    processes: list[subprocess.Popen[bytes]] = []
    outcomes: dict[int, Outcome] = {}
    sys.stdout.write(f"{len(trials)} trials in {trials[0].folder.parent}\n")
    sys.stdout.flush()
    with forwarding_signals(processes) as received:
        while running or (waiting and not received):
            free = [slot for slot in range(parallel) if slot not in running]
            for slot in free[: 0 if received else len(waiting)]:
                running[slot] = _start(waiting.pop(0), slot, parallel)
                processes.append(running[slot].process)
            time.sleep(_POLL_SECONDS)
            for slot in [slot for slot, job in running.items() if job.process.poll() is not None]:
                ended = running.pop(slot)
                outcomes[ended.trial.number] = outcome = _read_outcome(ended)
                _tell_ended(ended.trial, outcome)
    sys.stdout.write(_table(trials, outcomes))
    sys.stdout.flush()
    return [_result_for_hydra(trial, outcomes.get(trial.number)) for trial in trials]


@dataclass(frozen=True)
class _Running:
    trial: Trial
    process: subprocess.Popen[bytes]
    started: float


def _start(trial: Trial, slot: int, parallel: int) -> _Running:
    env = {}
    if parallel > 1:
        env["OMP_NUM_THREADS"] = str(max(1, count_cores() // (parallel * trial.nproc)))
        if gpus := _gpus_of_slot(slot, parallel):
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    logs = trial.folder / "logs"
    logs.mkdir(exist_ok=True)
    with open(logs / "terminal.log", "ab") as output:
        return _Running(trial, start_job(_job(trial, env), output), time.monotonic())


def _job(trial: Trial, env: Mapping[str, str]) -> JobSpec:
    return JobSpec(
        module="dtune.worker",
        arguments=(str(trial.folder),),
        run_dir=trial.folder,
        nproc=trial.nproc,
        max_restarts=trial.run.launch.max_restarts,
        env=env,
    )


def _gpus_of_slot(slot: int, parallel: int) -> list[str]:
    gpus = visible_gpus()
    share = len(gpus) // parallel
    return gpus[slot * share : (slot + 1) * share]


def _check_share(nproc: int, share: Sequence[str], parallel: int) -> None:
    if visible_gpus() and nproc > len(share):
        raise ConfigError(
            f"launch.nproc={nproc} is above the {len(share)} GPUs of a trial, with "
            f"hydra.launcher.parallel={parallel} trials at once; lower one of the two"
        )


def _read_outcome(running: _Running) -> Outcome:
    folder = running.trial.folder
    status = read_status(folder)
    state, message = status.state, status.message
    if state is State.running:  # It died before it could say so.
        state = State.failed
        message = f"exit code {exit_code(running.process.returncode)}"
    result_file = folder / "result.json"
    result = json.loads(result_file.read_text()) if result_file.is_file() else {}
    # 0: the run was over before its warm-up was.
    speed = result.get("tokens_per_second") or None
    return Outcome(
        state=state,
        message=message,
        seconds=time.monotonic() - running.started,
        scores=read_scores(folder, running.trial.run.checkpoint.best),
        tokens_per_second=speed,
    )


def read_scores(folder: Path, best: Best) -> Scores:
    """The best evaluation of a run by ``checkpoint.best``, and its last loss in training."""
    # Only now, because it imports torch.
    from dtune.train.sinks.jsonl import read_metrics

    file = folder / "metrics.jsonl"
    rows: list[dict[str, Any]] = list(read_metrics(file)) if file.is_file() else []
    evaluated = [row for row in rows if row["kind"] == "eval" and row["step"] > 0]
    trained = [row["loss"] for row in rows if row["kind"] == "train" and row["loss"] is not None]
    sign = -1 if best is Best.exact_match else 1
    found = min(evaluated, key=lambda row: sign * row[best.value], default={})
    return Scores(
        loss=found.get("loss"),
        exact_match=found.get("exact_match"),
        train_loss=trained[-1] if trained else None,
    )


def objective_of(run: RunConfig, scores: Scores) -> float | None:
    """The number that a sweeper is given: always the same metric for the same settings."""
    if run.data.eval_path == "none":
        return scores.train_loss
    return scores.exact_match if run.checkpoint.best is Best.exact_match else scores.loss


def _tell_ended(trial: Trial, outcome: Outcome) -> None:
    value = objective_of(trial.run, outcome.scores)
    metric = "train loss" if trial.run.data.eval_path == "none" else trial.run.checkpoint.best.value
    loss = "" if value is None else f"  {metric} {value:.4f}"
    line = f"trial {trial.number}  {outcome.state.value}  {trial.label}{loss}"
    sys.stdout.write(f"{line}  {outcome.seconds:.0f} s\n")
    if EXIT_CODES[outcome.state] not in (0, EXIT_CODES[State.preempted]):
        first = outcome.message.splitlines()[0] if outcome.message else "no message"
        sys.stdout.write(f"  {first}\n  log: {trial.folder / 'logs' / 'terminal.log'}\n")
    sys.stdout.flush()


def _table(trials: Sequence[Trial], outcomes: dict[int, Outcome]) -> str:
    numbers = ("held-out loss", "exact match", "train loss", "tokens/s")
    rows = [("trial", "settings", "state", *numbers, "folder")]
    for trial in trials:
        head = (str(trial.number), trial.label)
        outcome = outcomes.get(trial.number)
        if outcome is None:
            rows.append((*head, "not started", *"-" * len(numbers), str(trial.folder)))
            continue
        scores = outcome.scores
        cells = (
            _cell(scores.loss, ".4f"),
            _cell(scores.exact_match, ".1%"),
            _cell(scores.train_loss, ".4f"),
            _cell(outcome.tokens_per_second, ",.0f"),
        )
        rows.append((*head, outcome.state.value, *cells, str(trial.folder)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(["", lines[0], "-" * max(map(len, lines)), *lines[1:], ""])


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def describe_trials(trials: Sequence[Trial]) -> list[JobReturn]:
    """Print the commands of every trial instead of running them, for ``launch.dry_run``."""
    for trial in trials:
        commands = describe_launch(_job(trial, {}), trial.overrides)
        sys.stdout.write(f"# trial {trial.number}  {trial.label}\n{commands}\n")
    return [_job_return(trial, JobStatus.COMPLETED, None) for trial in trials]


def _result_for_hydra(trial: Trial, outcome: Outcome | None) -> JobReturn:
    """The objective of a trial that is done, an error for any other."""
    if outcome is not None and outcome.state is State.done:
        return _job_return(trial, JobStatus.COMPLETED, objective_of(trial.run, outcome.scores))
    stopped = outcome is None or outcome.state is State.preempted
    error = TrialFailed(EXIT_CODES[State.preempted] if stopped else 1)
    return _job_return(trial, JobStatus.FAILED, error)


def _job_return(trial: Trial, status: JobStatus, value: object) -> JobReturn:
    return JobReturn(
        overrides=list(trial.overrides),
        cfg=trial.composed,
        working_dir=str(trial.folder),
        task_name="train",
        status=status,
        _return_value=value,
    )
