"""``hydra/launcher=dtune_local``: the trials of a sweep on this machine.

Hydra imports this module whenever it starts, in any application: nothing heavy at its head. It
does so without entering it in sys.modules, where a dataclass looks up annotations that are text:
so no ``from __future__ import annotations`` here.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hydra.core.config_store import ConfigStore
from hydra_plugins.dtune_launcher._base import DtuneLauncher

if TYPE_CHECKING:
    from dtune_launch.spec import LaunchConfig
    from hydra_plugins.dtune_launcher._trials import Trial

    from dtune.sweep.local import Task
    from dtune.sweep.standing import SweepView


@dataclass
class DtuneLocalConf:
    """Keys of ``hydra.launcher`` for trials on this machine."""

    _target_: str = "hydra_plugins.dtune_launcher.local.DtuneLocalLauncher"
    # Trials at once; they share the GPUs and CPU cores evenly.
    parallel: int = 1
    # Wait for the end; false: go on in the background, and return at once.
    wait: bool = True
    # Minutes after which a trial is asked to save and stop; 0: never.
    max_minutes: float = 0
    # Seconds after that in which it may save; then it is killed.
    grace_seconds: float = 120
    # Go on with the sweep in hydra.sweep.dir: only what is not done (dtune sweep resume sets it).
    resume: bool = False
    # With resume: also those that were pruned.
    pruned: bool = False


ConfigStore.instance().store(group="hydra/launcher", name="dtune_local", node=DtuneLocalConf)


class DtuneLocalLauncher(DtuneLauncher):
    """Runs so many trials at once, each as a process tree with its share of the machine."""

    least_parallel = 1

    def __init__(
        self,
        parallel: int = 1,
        wait: bool = True,
        max_minutes: float = 0,
        grace_seconds: float = 120,
        resume: bool = False,
        pruned: bool = False,
    ) -> None:
        super().__init__(parallel=parallel, wait=wait, resume=resume, pruned=pruned)
        self.max_minutes = max_minutes
        self.grace_seconds = grace_seconds

    def processes(self, launch: "LaunchConfig", engine: str) -> int:
        """Processes of a trial; ConfigError where its share of the GPUs is too small."""
        from dtune_launch.gpus import resolve_nproc, visible_gpus

        from dtune.errors import ConfigError
        from dtune.sweep.local import gpus_of_slot

        if launch.gpus_of_node is not None or launch.num_nodes > 1:
            raise ConfigError(
                f"hydra/launcher=dtune_local runs trials on this machine alone, and launch="
                f"{launch.name} is for others; set hydra/launcher=dtune_slurm, or launch=local"
            )
        share = gpus_of_slot(0, self.parallel)
        nproc = resolve_nproc(launch, engine=engine, gpus=len(share))
        if visible_gpus() and nproc > len(share):
            raise ConfigError(
                f"launch.nproc={nproc} is above the {len(share)} GPUs of a trial, with "
                f"hydra.launcher.parallel={self.parallel} trials at once; lower one of the two"
            )
        return nproc

    def run(self, view: "SweepView", trials: Sequence["Trial"], numbers: Collection[int]) -> bool:
        """Run the trials to their ends."""
        from dtune.sweep.local import Limits, run_local
        from dtune.sweep.waiting import wait_for

        if not self.wait:
            return True
        limits = Limits(self.parallel, self.max_minutes, self.grace_seconds)
        whole = run_local(view, [_task(trial) for trial in trials], limits, self.watch)
        # Those that a launcher which was killed has left running.
        left = set(numbers) - {trial.number for trial in trials}
        left = {one.number for one in view.look() if one.number in left and not one.is_over}
        return whole and wait_for(view, left, poll_seconds=1)

    def hand_over(self, view: "SweepView") -> None:
        """Have a process in the background run the trials, where they are not waited for."""
        from dtune.sweep.local import run_in_background

        if not self.wait:
            run_in_background(view)

    def describe(self, trials: Sequence["Trial"]) -> str:
        """The commands of every trial."""
        from dtune_launch.local import describe_job
        from hydra_plugins.dtune_launcher._trials import describe_trial

        return "\n".join(
            f"# trial {trial.number}  {trial.label}\n{describe_trial(trial)}\n"
            f"{describe_job(_task(trial).job({}))}"
            for trial in trials
        )


def _task(trial: "Trial") -> "Task":
    from dtune.sweep.local import Task

    run = trial.run
    return Task(trial.number, trial.folder, trial.nproc, run.launch.max_restarts, run.watch.save)
