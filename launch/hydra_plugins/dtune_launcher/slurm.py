"""``hydra/launcher=dtune_slurm``: each trial an element of a SLURM array, with its own nodes.

Hydra imports this module whenever it starts: nothing heavy at its head, and no ``from __future__
import annotations`` (see local.py).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.config_store import ConfigStore
from hydra_plugins.dtune_launcher._base import DtuneLauncher

if TYPE_CHECKING:
    from dtune_launch.spec import LaunchConfig
    from hydra_plugins.dtune_launcher._trials import Trial

    from dtune.sweep.slurm import Element
    from dtune.sweep.standing import SweepView


@dataclass
class DtuneSlurmConf:
    """Keys of ``hydra.launcher`` for trials on a cluster; what a node has is in ``launch``."""

    _target_: str = "hydra_plugins.dtune_launcher.slurm.DtuneSlurmLauncher"
    # Trials at once; 0: as many as the cluster lets.
    parallel: int = 0
    # Wait for the end; false: return once the array is submitted (a search always waits).
    wait: bool = False
    # Seconds between two looks at the trials that are waited for.
    poll_seconds: float = 5
    # Go on with the sweep in hydra.sweep.dir: only what is not done (dtune sweep resume sets it).
    resume: bool = False
    # With resume: also those that were pruned.
    pruned: bool = False


ConfigStore.instance().store(group="hydra/launcher", name="dtune_slurm", node=DtuneSlurmConf)


class DtuneSlurmLauncher(DtuneLauncher):
    """Submits one array for the trials, whose elements run their folders."""

    def __init__(
        self,
        parallel: int = 0,
        wait: bool = False,
        poll_seconds: float = 5,
        resume: bool = False,
        pruned: bool = False,
    ) -> None:
        super().__init__(parallel=parallel, wait=wait, resume=resume, pruned=pruned)
        self.poll_seconds = poll_seconds
        self._checked: list[LaunchConfig] = []

    def processes(self, launch: "LaunchConfig", engine: str) -> int:
        """Processes of a trial on each node; ConfigError where the cluster has no such nodes."""
        from dtune_launch.gpus import resolve_nproc
        from dtune_launch.schema.slurm import SlurmConfig
        from dtune_launch.spec import LaunchError

        from dtune.errors import ConfigError
        from dtune.sweep.local import say

        if not isinstance(launch, SlurmConfig):
            raise ConfigError(
                f"hydra/launcher=dtune_slurm submits trials as launch=slurm says (nodes, GPUs, "
                f"partition), and this is launch={launch.name}; set launch=slurm"
            )
        if launch not in self._checked and not launch.dry_run:
            self._checked.append(launch)
            try:
                warnings = launch.check(Path(str(self._config.hydra.sweep.dir)).absolute())
            except LaunchError as error:
                raise ConfigError(str(error)) from error
            for warning in warnings:
                say(f"dtune: {warning}")
        return resolve_nproc(launch, engine=engine)

    def run(self, view: "SweepView", trials: Sequence["Trial"], numbers: Collection[int]) -> bool:
        """Submit the trials; wait for them where asked to."""
        from dtune.sweep.folder import read_trial
        from dtune.sweep.local import say
        from dtune.sweep.slurm import ask_to_stop, submit_arrays
        from dtune.sweep.waiting import wait_for

        sweep = view.folder
        if trials:
            for array in submit_arrays(sweep, _elements(trials), self.parallel):
                say(f"job {array}; logs: {sweep}/logs, {sweep}/<trial>/logs")
        if not self.wait:
            say(f"watch it:  dtune sweep status {sweep} -f")
            return True
        whole = wait_for(
            view,
            numbers,
            poll_seconds=self.poll_seconds,
            watch=self.watch,
            ask_to_stop=lambda folder: ask_to_stop(read_trial(folder).attempts[-1].job),
        )
        if not whole:
            say(f"the jobs go on; dtune sweep resume {sweep} waits for them again")
        return whole

    def describe(self, trials: Sequence["Trial"]) -> str:
        """The configs and the scripts."""
        from hydra_plugins.dtune_launcher._trials import describe_trial

        from dtune.sweep.slurm import scripts_of

        told = [
            f"# trial {trial.number}  {trial.label}\n{describe_trial(trial)}" for trial in trials
        ]
        sweep = trials[0].folder.parent
        scripts = scripts_of(sweep, _elements(trials), self.parallel)
        return "\n".join([*told, *(text for text, _ in scripts)])


def _elements(trials: Sequence["Trial"]) -> "list[Element]":
    from dtune_launch.schema.slurm import SlurmConfig

    from dtune.sweep.slurm import Element

    found = []
    for trial in trials:
        launch = trial.run.launch
        assert isinstance(launch, SlurmConfig)
        found.append(Element(trial.number, trial.folder, launch, trial.nproc))
    return found
