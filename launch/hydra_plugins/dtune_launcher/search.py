"""``hydra/sweeper=dtune_optuna``: trials chosen by what earlier ones came to.

Hydra imports this module whenever it starts: nothing heavy at its head, and no ``from __future__
import annotations`` (see local.py).
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class DtuneOptunaConf:
    """Keys of ``hydra.sweeper`` for a search."""

    _target_: str = "hydra_plugins.dtune_launcher.search.DtuneOptunaSweeper"
    # Trials in all, those that fail or are pruned among them.
    n_trials: int = 20
    # Trials that are chosen together, and run before more are; 0: hydra.launcher.parallel.
    batch: int = 0
    # How trials are chosen: tpe (by what was good so far) or random.
    sampler: str = "tpe"
    # Seed of the choices.
    seed: int = 1
    # Trials chosen at random before tpe begins to learn.
    startup_trials: int = 10
    # What ends hopeless trials: median (behind half of the others at a step), halving, or none.
    pruner: str = "median"
    # Trials that must be done before median ends any.
    prune_after_trials: int = 5
    # Optimizer steps that every trial is given before it may be ended.
    prune_after_step: int = 0
    # What is searched, by key: choice(a,b), range(1,9), tag(log,interval(1e-5,1e-2)).
    params: dict[str, str] = field(default_factory=dict)


ConfigStore.instance().store(group="hydra/sweeper", name="dtune_optuna", node=DtuneOptunaConf)


class DtuneOptunaSweeper(Sweeper):
    """Chooses trials by an Optuna study in the folder of the sweep."""

    def __init__(self, n_trials: int, batch: int, params: dict[str, str], **settings: Any) -> None:
        self.n_trials = n_trials
        self.batch = batch
        self.params = params
        self.settings = settings

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Make the launcher; called once by Hydra."""
        self.master, self.loader = config, hydra_context.config_loader
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Run the search to its last trial, or go on with the one that the folder holds."""
        from hydra_plugins.dtune_launcher._search import run_search

        run_search(self, arguments)
