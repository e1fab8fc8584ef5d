"""``hydra/launcher=dtune_local``: the trials of a sweep on this machine.

Hydra imports this module whenever it starts, in any application: nothing heavy at its head. It
does so without entering it in sys.modules, where a dataclass looks up annotations that are text:
so no ``from __future__ import annotations`` here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class DtuneLocalConf:
    """Keys of ``hydra.launcher``."""

    _target_: str = "hydra_plugins.dtune_launcher.local.DtuneLocalLauncher"
    # Trials at once; they share the GPUs and CPU cores evenly.
    parallel: int = 1


ConfigStore.instance().store(group="hydra/launcher", name="dtune_local", node=DtuneLocalConf)


class DtuneLocalLauncher(Launcher):
    """Composes and checks every trial of a batch first, then runs each as a process tree."""

    def __init__(self, parallel: int = 1) -> None:
        self.parallel = parallel

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what `launch` needs; called once by Hydra."""
        self._hydra_context = hydra_context
        self._config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run one trial for each list of overrides; what each came to, in their order.

        Raises:
            ConfigError: A trial's settings are wrong; none has been started.
        """
        from hydra_plugins.dtune_launcher._trials import (
            describe_trials,
            plan_trials,
            run_trials,
            start_folders,
        )

        trials = plan_trials(
            self._config,
            job_overrides,
            first_number=initial_job_idx,
            loader=self._hydra_context.config_loader,
            parallel=self.parallel,
        )
        if any(trial.run.launch.dry_run for trial in trials):
            return describe_trials(trials)
        start_folders(trials)
        return run_trials(trials, parallel=self.parallel)
