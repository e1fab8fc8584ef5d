"""What the launchers of dtune have in common: plan, freeze, run, tell.

Hydra imports the launchers wherever it starts, in any application: nothing heavy at the head.
"""

from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

if TYPE_CHECKING:
    from dtune_launch.spec import LaunchConfig
    from hydra_plugins.dtune_launcher._trials import Trial

    from dtune.sweep.local import Watch
    from dtune.sweep.standing import SweepView


class DtuneLauncher(Launcher):
    """Composes and checks every trial of a batch first, then runs each as a process tree."""

    least_parallel = 0
    """Smallest ``parallel``; 0: as many as there are."""

    def __init__(self, *, parallel: int, wait: bool, resume: bool, pruned: bool) -> None:
        self.parallel = parallel
        self.wait = wait
        self.resume = resume
        self.pruned = pruned
        self.watch: Watch | None = None
        """Set by a sweeper that ends hopeless trials."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what `launch` needs; called once by Hydra."""
        self._hydra_context = hydra_context
        self._config = config

    @abstractmethod
    def processes(self, launch: "LaunchConfig", engine: str) -> int:
        """Processes of a trial on each of its nodes; ConfigError where there is no room for it."""

    @abstractmethod
    def run(self, view: "SweepView", trials: Sequence["Trial"], numbers: Collection[int]) -> bool:
        """Start trials whose folders are made, and wait for all of ``numbers`` where asked to.

        False where a signal ended that.
        """

    def hand_over(self, view: "SweepView") -> None:
        """Leave the trials to another process, where they are not waited for."""
        return None

    @abstractmethod
    def describe(self, trials: Sequence["Trial"]) -> str:
        """What `run` would do, as a shell would take it."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run one trial for each list of overrides; what each came to, in their order."""
        return self.launch_numbered(list(enumerate(job_overrides, initial_job_idx)))

    def launch_numbered(self, jobs: Sequence[tuple[int, Sequence[str]]]) -> Sequence[JobReturn]:
        """Run trials given by number and overrides; what each came to, in their order.

        The value of a trial is its objective, not a number where it has none. On a folder that
        holds the sweep already (``resume``), runs only those that are not done.

        Raises:
            ConfigError: A trial's settings are wrong; none has been started.
            SweepStopped: A signal came; it ends dtune.
        """
        from hydra_plugins.dtune_launcher._trials import (
            Plan,
            begin_sweep,
            plan_trials,
            start_folder,
        )

        from dtune.errors import ConfigError
        from dtune.runtime.lock import holding
        from dtune.sweep.ended import SweepStopped, note_end
        from dtune.sweep.folder import read_sweep
        from dtune.sweep.local import say
        from dtune.sweep.standing import SweepView, exit_code_of, table_of

        if self.parallel < self.least_parallel:
            raise ConfigError(
                f"hydra.launcher.parallel={self.parallel} must be at least {self.least_parallel}"
            )
        loader = self._hydra_context.config_loader
        plan = Plan(self._config, loader, self.processes, self.resume)
        if self.resume:
            read_sweep(plan.sweep)
        trials = plan_trials(plan, jobs)
        if any(trial.run.launch.dry_run for trial in trials):
            say(self.describe(trials))
            return [_result(trial, None) for trial in trials]
        with holding(plan.sweep):
            begin_sweep(plan, trials)
            view = SweepView(plan.sweep)
            todo = self._unfinished(view, trials)
            for trial in todo:
                start_folder(trial)
            of = f" of {len(trials)}" if len(todo) < len(trials) else ""
            say(f"{len(todo)}{of} trials in {plan.sweep}")
            numbers = {trial.number for trial in trials}
            whole = self.run(view, todo, numbers)
            standings = [one for one in view.look() if one.number in numbers]
        self.hand_over(view)
        say("\n" + table_of(standings) + f"dtune sweep status {plan.sweep}")
        if self.wait:
            note_end(exit_code_of(standings))
        if not whole:
            raise SweepStopped(exit_code_of(standings))
        values = {one.number: one.value for one in standings}
        return [_result(trial, values[trial.number]) for trial in trials]

    def _unfinished(self, view: "SweepView", trials: Sequence["Trial"]) -> list["Trial"]:
        """The trials that are neither at their end nor at work."""
        from dtune.sweep.standing import DONE, PRUNED, QUEUED, RUNNING, UNKNOWN

        left = {DONE, RUNNING, QUEUED, UNKNOWN} | (set() if self.pruned else {PRUNED})
        states = {one.number: one.state for one in view.look()}
        return [trial for trial in trials if states.get(trial.number) not in left]


def _result(trial: "Trial", value: float | None) -> JobReturn:
    """What Hydra is given: never an error, which would hide the trials after it."""
    return JobReturn(
        overrides=list(trial.record.overrides),
        cfg=trial.composed,
        working_dir=str(trial.folder),
        task_name="train",
        status=JobStatus.COMPLETED,
        _return_value=float("nan") if value is None else value,
    )
