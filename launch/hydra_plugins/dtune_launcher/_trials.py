"""From the overrides of a sweep to trials that are composed, checked and frozen.

The underscore keeps Hydra from importing this where it only looks.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtune_launch.spec import LaunchConfig
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import filter_overrides
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from dtune.config.compose import explain
from dtune.config.freeze import freeze, load_frozen
from dtune.config.run import RunConfig
from dtune.config.support import check_run
from dtune.errors import ConfigError
from dtune.run_folder import start_run_folder
from dtune.sweep.folder import (
    SWEEP_FILE,
    TRIAL_FILE,
    SweepRecord,
    TrialRecord,
    label_of,
    read_sweep,
    read_trial,
    write_sweep,
    write_trial,
)
from dtune.sweep.metrics import objective_of

Processes = Callable[[LaunchConfig, str], int]
"""Processes of a trial on each of its nodes, by its launch settings and its engine."""


@dataclass(frozen=True)
class Trial:
    """One point of a sweep, composed and checked."""

    record: TrialRecord
    label: str
    """The settings that differ between trials."""
    run: RunConfig
    text: str
    """The frozen config."""
    composed: DictConfig
    nproc: int
    """Processes on each node."""
    is_new: bool

    @property
    def number(self) -> int:
        """Its place in the sweep."""
        return self.record.number

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.run_dir)


@dataclass(frozen=True)
class Plan:
    """What a sweep is composed from."""

    config: DictConfig
    loader: ConfigLoader
    processes: Processes
    resume: bool
    """Whether trials may be there from before."""

    @property
    def sweep(self) -> Path:
        """The folder of the sweep."""
        return Path(str(self.config.hydra.sweep.dir)).absolute()


def swept_keys(plan: Plan) -> dict[str, str]:
    """Keys that the sweep varies, each with its values as they were given."""
    arguments = [str(one) for one in plan.config.hydra.overrides.task]
    params = OmegaConf.select(plan.config, "hydra.sweeper.params") or {}
    arguments += [f"{key}={value}" for key, value in params.items()]
    parser = OverridesParser.create(config_loader=plan.loader)
    return {
        override.key_or_group: override.get_value_string()
        for override in parser.parse_overrides(arguments)
        if override.is_sweep_override()
    }


def plan_trials(plan: Plan, jobs: Sequence[tuple[int, Sequence[str]]]) -> list[Trial]:
    """Compose, freeze and check trials, given by number and overrides.

    ConfigError names the first that is wrong.
    """
    swept = swept_keys(plan)
    return [_plan_trial(plan, overrides, number, swept) for number, overrides in jobs]


def _plan_trial(plan: Plan, overrides: Sequence[str], number: int, swept: dict[str, str]) -> Trial:
    record = TrialRecord(number, tuple(filter_overrides(overrides)), {})
    label = label_of(record, swept)
    try:
        composed = _compose(plan, overrides, number)
        record = dataclasses.replace(record, choices=_choices(composed))
        with open_dict(composed):
            del composed["hydra"]
        folder = Path(str(composed.run_dir))
        is_new = not (plan.resume and (folder / TRIAL_FILE).is_file())
        text = freeze(composed)
        if not is_new:
            record = _same_trial(record, read_trial(folder))
            text = _renew(folder, text)
        run = load_frozen(text)
        nproc = plan.processes(run.launch, run.parallel.name)
        check_run(run, nproc * run.launch.num_nodes)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"trial {number} ({label}): {explain(error)}") from error
    except ConfigError as error:
        raise ConfigError(f"trial {number} ({label}): {error}") from error
    return Trial(record, label, run, text, composed, nproc, is_new)


def _choices(composed: DictConfig) -> dict[str, str]:
    """Option of every group of a run."""
    return {
        str(group): str(option)
        for group, option in composed.hydra.runtime.choices.items()
        if not str(group).startswith("hydra/")
    }


def _compose(plan: Plan, overrides: Sequence[str], number: int) -> DictConfig:
    """The config of one trial, its run folder inside the sweep's."""
    if any(override.lstrip("+").startswith("run_dir=") for override in overrides):
        raise ConfigError("a sweep names the folders of its trials; set hydra.sweep.dir instead")
    composed = plan.loader.load_sweep_config(plan.config, list(overrides))
    with open_dict(composed):
        composed.hydra.job.id = str(number)
        composed.hydra.job.num = number
    HydraConfig.instance().set_config(composed)
    folder = Path(str(composed.hydra.sweep.dir), str(composed.hydra.sweep.subdir))
    with open_dict(composed):
        composed.run_dir = str(folder)
        # A trial that is started again goes on from what it has saved.
        if str(composed.resume).lower() == "false":
            composed.resume = "auto"
    return composed


def _same_trial(wanted: TrialRecord, there: TrialRecord) -> TrialRecord:
    """The record that is there; ConfigError if it is of other settings."""

    def own(record: TrialRecord) -> list[str]:
        # How a trial is launched may change.
        settings = record.settings.items()
        return sorted(f"{k}={v}" for k, v in settings if k.split(".")[0] != "launch")

    before, now = own(there), own(wanted)
    if before != now:
        raise ConfigError(
            f"the sweep holds another trial of this number: {' '.join(before)}; "
            "go on with the command that began it, dtune sweep resume"
        )
    return there


def _renew(folder: Path, text: str) -> str:
    """The config that a trial was frozen with, started as the sweep is launched now."""
    frozen = OmegaConf.create((folder / "config.yaml").read_text(encoding="utf-8"))
    assert isinstance(frozen, DictConfig)
    frozen.launch = OmegaConf.create(text).launch
    if any(folder.glob("checkpoints/step-*")):
        frozen.resume = "auto"
    return OmegaConf.to_yaml(frozen)


def begin_sweep(plan: Plan, trials: Sequence[Trial]) -> None:
    """Write sweep.yaml before the first trials; ConfigError where another sweep is there."""
    objectives = {objective_of(trial.run) for trial in trials}
    if len(objectives) > 1:
        raise ConfigError(
            "trials of one sweep must be judged alike: sweep over neither checkpoint.best nor "
            "whether there are held-out rows (data.eval_path)"
        )
    (objective,) = objectives
    if (plan.sweep / SWEEP_FILE).is_file():
        if trials[0].number == 0 and not plan.resume:
            raise ConfigError(
                f"hydra.sweep.dir={plan.sweep} holds a sweep; go on with it by "
                f"dtune sweep resume {plan.sweep}, or name another folder"
            )
        if objective != read_sweep(plan.sweep).objective:
            raise ConfigError("checkpoint.best and data.eval_path cannot change within a sweep")
        return
    launcher = OmegaConf.to_container(plan.config.hydra.launcher, resolve=True)
    assert isinstance(launcher, dict)
    chosen = str(plan.config.hydra.runtime.choices["hydra/launcher"])
    settings = {str(k): v for k, v in launcher.items() if k not in ("_target_", "resume")}
    write_sweep(
        plan.sweep,
        SweepRecord(
            command=tuple(sys.argv[1:]),
            directory=str(Path.cwd()),
            swept=swept_keys(plan),
            objective=objective,
            launcher={"name": chosen, **settings},
            searchpath=_searchpath(plan.config),
        ),
    )


def _searchpath(config: DictConfig) -> tuple[str, ...]:
    """Folders of the user's own options, absolute."""
    return tuple(
        str(Path(str(source.path)).absolute())
        for source in config.hydra.runtime.config_sources
        if source.schema == "file" and source.provider != "main"
    )


def start_folder(trial: Trial) -> None:
    """Make a run folder, or renew that of a trial to be gone on with.

    Raises ConfigError where a new one holds something.
    """
    settings = [*trial.record.overrides, f"run_dir={trial.folder}"]
    run = dataclasses.replace(trial.run, resume="false") if trial.is_new else trial.run
    start_run_folder(run, trial.text, command=["dtune", "train", *settings])
    write_trial(trial.folder, trial.record)


def describe_trial(trial: Trial) -> str:
    """The command of the config of a trial, as a shell would take it."""
    own = ("run_dir=", "launch.dry_run=")
    given = [one for one in trial.record.overrides if not one.lstrip("+").startswith(own)]
    config = [sys.executable, "-m", "dtune", "config", *given, f"run_dir={trial.folder}"]
    folder = shlex.quote(str(trial.folder))
    return f"mkdir -p {folder} && {shlex.join(config)} > {folder}/config.yaml"
