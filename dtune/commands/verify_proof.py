"""``dtune verify --resume-proof``: a run in one go against one that is resumed half way."""

from __future__ import annotations

import secrets
import shutil
import sys
from pathlib import Path

from dtune_launch.gpus import resolve_nproc
from dtune_launch.local import run_job
from dtune_launch.spec import JobSpec
from omegaconf import DictConfig, OmegaConf

from dtune.checkpoint.compare import find_differences
from dtune.checkpoint.layout import step_name
from dtune.checkpoint.reader import CHECKPOINTS, CheckpointInfo, open_checkpoint
from dtune.config.freeze import load_frozen, read_frozen
from dtune.config.run import RunConfig
from dtune.config.support import check_run
from dtune.errors import ConfigError
from dtune.run_folder import start_run_folder
from dtune.runtime.status import EXIT_CODES, State, read_status
from dtune.train.sinks.base import Row
from dtune.train.sinks.jsonl import read_metrics

# What a clock or the process decides.
_TIMED = frozenset("tokens_per_second targets_per_second peak_memory_gib mfu".split())
_SHOWN = 5


class ProofStoppedError(Exception):
    """A run of the proof did not come to its end; ``code`` is that of ``dtune``."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def prove(folder: Path, *, steps: int, nproc: str, keep: bool) -> int:
    """Train ``steps`` steps of the run once whole and once resumed, and compare; the exit code."""
    if steps < 2 or steps % 2:
        raise ConfigError(f"steps={steps} must be an even number from 2 on")
    run = read_frozen(folder)
    world = _world_of(run, nproc)
    place = folder.parent / f".{folder.name}-proof-{secrets.token_hex(3)}"
    _say(f"proof in {place}: {steps} steps on {world} processes, and resumed at {steps // 2}")
    equal = False
    try:
        equal = _prove(folder, place, steps, world)
    except ProofStoppedError as stopped:
        _say(f"a run of the proof has ended with exit code {stopped.code}")
        return stopped.code
    finally:
        if equal and not keep:
            shutil.rmtree(place, ignore_errors=True)
        elif place.exists():
            _say(f"kept: {place}")
    return 0 if equal else 1


def _prove(folder: Path, place: Path, steps: int, world: int) -> bool:
    whole = _train(folder, place / "whole", steps, world)
    middle = place / "whole" / CHECKPOINTS / step_name(steps // 2)
    resumed = _resume(folder, middle, place / "resumed", steps, world)
    lines = _compare(whole, resumed, steps // 2)
    tensors = len(whole.tensors)
    _say(
        f"compared after step {steps}: {tensors} tensors of parameters and optimizer, scalars, "
        f"position in the data, generators of {world} ranks, {steps - steps // 2} rows of metrics"
    )
    if not lines:
        _say("verdict: resumed equals uninterrupted, bit for bit")
        return True
    _say("verdict: resumed differs from uninterrupted")
    for line in lines[:_SHOWN]:
        _say(f"  {line}")
    if len(lines) > _SHOWN:
        _say(f"  and {len(lines) - _SHOWN} more")
    again = _resume(folder, middle, place / "again", steps, world)
    if _compare(resumed, again, steps // 2):
        _say(
            "Two runs from one checkpoint differ as well: this machine does not compute the same "
            "twice with these settings, whether resumed or not"
        )
    else:
        _say("Two runs from that checkpoint are equal: what differs is not saved or not restored")
    return False


def _resume(folder: Path, middle: Path, target: Path, steps: int, world: int) -> CheckpointInfo:
    """Train from a copy of the checkpoint in the middle to the end."""
    copy_checkpoint(middle, target / CHECKPOINTS / middle.name)
    return _train(folder, target, steps, world)


def copy_checkpoint(middle: Path, target: Path) -> None:
    """Give a run that is to be resumed what it goes on from."""
    shutil.copytree(middle, target)


def _train(folder: Path, target: Path, steps: int, world: int) -> CheckpointInfo:
    """Run to the end in a folder of its own, from the checkpoint that is there if there is one."""
    text = _settings(folder, target, steps, world)
    config = load_frozen(text)
    check_run(config, world)
    start_run_folder(config, text, command=["dtune", "verify", str(folder), "--resume-proof"])
    run_job(JobSpec("dtune.worker", (str(target),), target, nproc=world))
    status = read_status(target)
    if status.state is not State.done:
        if status.message:
            _say(status.message)
        raise ProofStoppedError(EXIT_CODES[status.state])
    return open_checkpoint(target / CHECKPOINTS / step_name(steps))


def _settings(folder: Path, target: Path, steps: int, world: int) -> str:
    """The run's own frozen config, shortened to what the proof is about."""
    config = OmegaConf.create((folder / "config.yaml").read_text(encoding="utf-8"))
    assert isinstance(config, DictConfig)
    launch = {"name": "local", "nproc": str(world), "max_restarts": 0, "dry_run": False}
    OmegaConf.update(config, "launch", launch, merge=False)
    given = {
        "run_dir": str(target),
        "resume": "auto",
        "train.max_steps": steps,
        "train.eval_every": 0,
        "train.early_stopping": 0,
        "data.eval_path": "none",
        "evaluate.before": False,
        "evaluate.generate": False,
        "checkpoint.every": steps // 2,
        "checkpoint.keep": 2,
        "checkpoint.best": "loss",
        "log.every": 1,
        "log.wandb": False,
        "log.tensorboard": False,
    }
    warmup = int(OmegaConf.select(config, "schedule.warmup_steps", default=0))
    given["schedule.warmup_steps"] = min(warmup, steps - 1)
    for key, value in given.items():
        OmegaConf.update(config, key, value)
    return OmegaConf.to_yaml(config)


def _world_of(run: RunConfig, nproc: str) -> int:
    if nproc:
        if not nproc.isdecimal() or int(nproc) < 1:
            raise ConfigError(f"nproc={nproc} must be a number of processes")
        return int(nproc)
    if run.launch.num_nodes > 1:
        raise ConfigError(
            f"the run is spread over {run.launch.num_nodes} machines, and the proof runs on this "
            "one: set nproc= to processes that it has room for"
        )
    return resolve_nproc(run.launch, engine=run.parallel.name)


def _compare(one: CheckpointInfo, other: CheckpointInfo, after: int) -> list[str]:
    rows = [_rows(info.path.parents[1], after) for info in (one, other)]
    return [*_differing_rows(*rows), *find_differences(one, other)]


def _rows(run_dir: Path, after: int) -> list[Row]:
    rows = read_metrics(run_dir / "metrics.jsonl")
    return [
        {name: value for name, value in row.items() if name not in _TIMED}
        for row in rows
        if row["kind"] == "train" and int(row["step"]) > after
    ]


def _differing_rows(one: list[Row], other: list[Row]) -> list[str]:
    if len(one) != len(other):
        return [f"metrics.jsonl has {len(one)} and {len(other)} rows after the middle"]
    return [
        f"step {before['step']}: {name} is {before.get(name)!r} and {after.get(name)!r}"
        for before, after in zip(one, other, strict=True)
        for name in before.keys() | after.keys()
        if before.get(name) != after.get(name)
    ]


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
