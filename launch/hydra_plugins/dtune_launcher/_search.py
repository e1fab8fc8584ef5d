"""What the search sweeper does: the space from Hydra's syntax, and its trials in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    IntervalSweep,
    Override,
    RangeSweep,
    Sweep,
    Transformer,
)
from hydra_plugins.dtune_launcher._base import DtuneLauncher
from hydra_plugins.dtune_launcher._trials import Plan, plan_trials

from dtune.errors import ConfigError
from dtune.runtime.capabilities import require
from dtune.runtime.lock import holding
from dtune.sweep.folder import SWEEP_FILE
from dtune.sweep.local import say
from dtune.sweep.metrics import Objective, objective_of
from dtune.sweep.space import Axis, Numbers, Space, Words, range_of, refuse_tags
from dtune.sweep.standing import SweepView

if TYPE_CHECKING:
    from hydra_plugins.dtune_launcher.search import DtuneOptunaSweeper

    from dtune.sweep.study import Chosen, Search, SearchSettings

# Choices in a row that cannot be run, after which the space is taken to be wrong.
_REFUSALS = 20
# Choices of which one must be one that can be run, before anything starts.
_PROBES = 5


def run_search(sweeper: DtuneOptunaSweeper, arguments: Sequence[str]) -> None:
    """Choose and run trials until there are ``n_trials``; go on with a search that is there."""
    require("optuna", "hydra/sweeper=dtune_optuna")
    from dtune.sweep.study import Search, SearchSettings

    launcher = sweeper.launcher
    if not isinstance(launcher, DtuneLauncher):
        raise ConfigError(
            "hydra/sweeper=dtune_optuna needs hydra/launcher=dtune_local or dtune_slurm"
        )
    if sweeper.n_trials < 1 or sweeper.batch < 0:
        raise ConfigError("hydra.sweeper.n_trials must be at least 1, and batch 0 or more")
    launcher.wait = True  # The next trials depend on these.
    settings = SearchSettings(**sweeper.settings)
    fixed, space = parse_space(sweeper, arguments)
    plan = Plan(sweeper.master, sweeper.loader, launcher.processes, launcher.resume)
    if (plan.sweep / SWEEP_FILE).is_file() and not launcher.resume:
        raise ConfigError(
            f"hydra.sweep.dir={plan.sweep} holds a sweep; go on with it by dtune sweep resume "
            f"{plan.sweep}, or name another folder"
        )
    objective, is_dry = _probe(plan, fixed, space, settings)
    runner = _Runner(sweeper, launcher, plan, fixed)
    if is_dry:
        runner.run_batch(Search(None, space, objective, settings), [], runner.batch_size)
        return
    with holding(plan.sweep):
        search = Search(plan.sweep, space, objective, settings)
        launcher.watch = search
        runner.run(search)
    view = SweepView(plan.sweep)
    counts: dict[str, int] = {}
    for one in view.look():
        counts[one.state] = counts.get(one.state, 0) + 1
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    say(f"\nsearch over: {told}\nthe winner:  dtune sweep best {plan.sweep}")


@dataclasses.dataclass
class _Runner:
    """Runs the trials of a search in batches."""

    sweeper: DtuneOptunaSweeper
    launcher: DtuneLauncher
    plan: Plan
    fixed: list[str]

    @property
    def batch_size(self) -> int:
        """Trials that are chosen together."""
        return self.sweeper.batch or max(1, self.launcher.parallel)

    def run(self, search: Search) -> None:
        """First what an earlier process has left, then new trials to the last."""
        again = search.unfinished(pruned=self.launcher.pruned) if self.launcher.resume else []
        left = max(0, self.sweeper.n_trials - len(search.numbers()))
        if not again and not left:
            say(
                f"{self.plan.sweep} has its {self.sweeper.n_trials} trials; raise "
                "hydra.sweeper.n_trials for more"
            )
        while again or left:
            now, again = again[: self.batch_size], again[self.batch_size :]
            new = min(left, self.batch_size - len(now))
            left -= new
            self.run_batch(search, now, new)

    def run_batch(self, search: Search, again: Sequence[int], new: int) -> None:
        """Run some trials again and some new ones; the study is told, whatever ends the batch."""
        chosen = [search.ask_again(number) for number in again]
        first = max(search.numbers(), default=-1) + 1
        chosen += [self._next(search, number) for number in range(first, first + new)]
        try:
            self.launcher.launch_numbered(
                [(one.number, [*self.fixed, *one.overrides]) for one in chosen]
            )
        finally:
            self._tell(search, {one.number for one in chosen})

    def _next(self, search: Search, number: int) -> Chosen:
        """The next choice that can be run; those that cannot are told as failed."""
        for _ in range(_REFUSALS):
            chosen = search.ask(number)
            try:
                plan_trials(self.plan, [(number, [*self.fixed, *chosen.overrides])])
            except ConfigError as error:
                refusal = error
                say(f"left out: {' '.join(chosen.overrides)}: {error}")
                search.leave_out(number)
            else:
                return chosen
        raise refusal

    def _tell(self, search: Search, numbers: set[int]) -> None:
        if not (self.plan.sweep / SWEEP_FILE).is_file():
            return  # Nothing has begun.
        view = SweepView(self.plan.sweep)
        for standing in view.look():
            if standing.number in numbers:
                search.tell(standing, view.evaluations(standing.folder))


def _probe(
    plan: Plan, fixed: list[str], space: Space, settings: SearchSettings
) -> tuple[Objective, bool]:
    """The objective and whether nothing is to be run, by a choice that can be run.

    Raises the ConfigError of the first choice where none can.
    """
    from dtune.sweep.study import Search

    random = dataclasses.replace(settings, sampler="random")
    any_objective = Objective("loss", "minimize")
    search, refusals = Search(None, space, any_objective, random), []
    for number in range(_PROBES):
        overrides = [*fixed, *search.ask(number).overrides]
        try:
            (trial,) = plan_trials(dataclasses.replace(plan, resume=False), [(0, overrides)])
        except ConfigError as error:
            refusals.append(error)
        else:
            return objective_of(trial.run), trial.run.launch.dry_run
    raise refusals[0]


def parse_space(sweeper: DtuneOptunaSweeper, arguments: Sequence[str]) -> tuple[list[str], Space]:
    """The overrides that all trials share, and what is searched; an argument beats a param."""
    params = [f"{key}={value}" for key, value in sweeper.params.items()]
    parser = OverridesParser.create(config_loader=sweeper.loader)
    overrides = {one.key_or_group: one for one in parser.parse_overrides([*params, *arguments])}
    fixed: list[str] = []
    space: dict[str, Axis] = {}
    for override in overrides.values():
        key = override.get_key_element()
        if not override.is_sweep_override():
            assert override.input_line is not None
            fixed.append(override.input_line)
            continue
        try:
            space[key] = _axis(override)
        except ConfigError as error:
            raise ConfigError(f"{override.input_line}: {error}") from error
    if not space:
        raise ConfigError(
            "nothing to search: give settings as choice(a,b), range(1,9) or interval(0,1), such as "
            "'optim.lr=tag(log,interval(1e-5,1e-2))'"
        )
    return fixed, space


def _axis(override: Override) -> Axis:
    """What a sweep in Hydra's grammar lets the search choose from."""
    value = override.value()
    if isinstance(value, Sweep):
        refuse_tags(sorted(value.tags))
    is_log = isinstance(value, Sweep) and "log" in value.tags
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        is_int = isinstance(value.start, int) and isinstance(value.end, int)
        return Numbers(value.start, value.end, is_log=is_log, is_int=is_int)
    if isinstance(value, RangeSweep):
        assert value.start is not None
        assert value.stop is not None
        return range_of(value.start, value.stop, value.step, is_log=is_log)
    if is_log:
        raise ConfigError("tag(log, ...) takes an interval or a range")
    words = override.sweep_iterator(transformer=Transformer.str)
    return Words(tuple(dict.fromkeys(str(word) for word in words)))
