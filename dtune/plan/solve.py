"""Settings that fit a card: the longest sequence, the largest micro batch, the least GPU-hours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from dtune.config.run import RunConfig
from dtune.config.support import check_run
from dtune.errors import ConfigError
from dtune.measure.memory import GIB
from dtune.measure.passes import Passes
from dtune.parallel.schema import PARALLEL, ParallelConfig, engines
from dtune.plan.cards import limit_of
from dtune.plan.run import Planner, RunPlan
from dtune.plan.search import largest_counted
from dtune.runtime.schema import Recompute

FIRST_LENGTH = 2048
FIRST_ROWS = 4

RECOMPUTE = (Recompute.none, Recompute.selective, Recompute.full)
"""From the least that is computed again to the most."""


@dataclass(frozen=True)
class Solution:
    """The largest size that fits, and what the next one would take."""

    key: str
    size: int
    plan: RunPlan | None
    """None where nothing fits."""
    limit: float
    """Bytes of the card."""
    beyond: int
    """Bytes that the next size takes."""
    least: int
    """The smallest size there is."""
    note: str = ""

    def rows(self) -> list[str]:
        """What was found, in words."""
        if self.plan is None:
            return [
                f"nothing fits: {self.key}={self.least} takes {self.beyond / GIB:.2f} GiB of "
                f"{self.limit / GIB:.2f} GiB (high)"
            ]
        high = self.plan.memory.high
        return [
            f"{self.key}={self.size}: {high / GIB:.2f} GiB of {self.limit / GIB:.2f} GiB (high); "
            f"one more takes {self.beyond / GIB:.2f} GiB{self.note}"
        ]


def find_max_length(planner: Planner) -> Solution:
    """The longest ``data.max_length`` that fits, with the micro batch as it is set."""
    found = _find(planner, "data.max_length", _with_length, FIRST_LENGTH, least=2)
    text = planner.built.spec.config.get_text_config().to_dict()
    positions = text.get("max_position_embeddings")
    if positions is None or found.size <= positions:
        return found
    return replace(found, note=f"; the model was made for {positions:,} positions")


def find_micro_batch(planner: Planner) -> Solution:
    """The largest ``train.micro_batch_size`` that fits; the global batch is raised with it."""
    return _find(planner, "train.micro_batch_size", planner.with_rows, FIRST_ROWS)


def _with_length(run: RunConfig, length: int) -> RunConfig:
    return replace(run, data=replace(run.data, max_length=length))


def _find(
    planner: Planner,
    key: str,
    put: Callable[[RunConfig, int], RunConfig],
    first: int,
    *,
    least: int = 1,
) -> Solution:
    limit = limit_of(planner.card)
    template = planner.memory(put(planner.run, first))

    def high(passes: Passes) -> int:
        return replace(template, saved=passes).high

    def count(size: int) -> Passes:
        return planner.memory(put(planner.run, size)).saved

    size = largest_counted(count, lambda passes: high(passes) <= limit, first=first, least=least)
    plan = planner.plan(put(planner.run, size)) if size else None
    return Solution(key, size, plan, limit, high(count(max(least, size + 1))), least)


@dataclass(frozen=True)
class Choice:
    """Settings that were planned, and what they come to."""

    settings: tuple[str, ...]
    plan: RunPlan
    offloads: bool

    @property
    def gpu_seconds(self) -> float:
        """For each position, padding included."""
        assert self.plan.times is not None
        return self.plan.ranks * self.plan.times.step / self.plan.slots

    def row(self) -> str:
        """For a table of choices."""
        speed = self.plan.slots_per_second
        assert speed is not None
        return (
            f"{speed:>12,.0f} tokens/s  {self.plan.memory.high / GIB:8.2f} GiB  "
            f"{' '.join(self.settings)}"
        )


def find_cheapest(planner: Planner) -> list[Choice]:
    """Settings that fit, those of the least GPU-hours first.

    Of engines, recomputation, and the largest micro batch that divides a rank's rows of a step;
    activations are offloaded where a level of recomputation does not fit without. What changes
    the result (model, method, quantisation, precision, global batch) stays as it is set.
    """
    found = []
    for parallel in _engines(planner):
        for recompute in RECOMPUTE:
            choice = _best(planner, parallel, recompute)
            if choice is None:
                continue
            found.append(choice)
            if choice.plan.micros == 1 and not choice.offloads:
                # More recomputation makes room for nothing.
                break
    return sorted(found, key=lambda choice: choice.gpu_seconds)


def _engines(planner: Planner) -> list[ParallelConfig]:
    """With the options of the one that is set, and else with none."""
    own = planner.run.parallel
    names = ["single"] if planner.ranks == 1 else [n for n in engines() if n != "single"]
    return [own if name == own.name else PARALLEL.config(name)() for name in names]


def _best(planner: Planner, parallel: ParallelConfig, recompute: Recompute) -> Choice | None:
    """With the largest micro batch that fits; None where none does."""
    run = planner.run
    for offload in (False, True):
        for rows in _micro_batches(run, planner.ranks):
            train = replace(
                run.train,
                recompute=recompute,
                offload_activations=offload,
                micro_batch_size=rows,
            )
            other = replace(run, parallel=parallel, train=train)
            if not is_legal(other, planner.ranks):
                break
            if planner.memory(other).high <= limit_of(planner.card):
                settings = (
                    f"parallel={parallel.name}",
                    f"train.recompute={recompute.value}",
                    f"train.offload_activations={str(offload).lower()}",
                    f"train.micro_batch_size={rows}",
                )
                return Choice(settings, planner.plan(other), offloads=offload)
    return None


def _micro_batches(run: RunConfig, ranks: int) -> list[int]:
    """Of what a rank has of a step, all and the powers of two that divide it; largest first."""
    each = run.train.global_batch_size // ranks
    powers = (1, 2, 4, 8, 16, 32)
    return sorted({n for n in (*powers, each) if n and each % n == 0}, reverse=True)


def is_legal(run: RunConfig, ranks: int) -> bool:
    """Whether settings hold together, with what is installed here."""
    try:
        check_run(run, ranks)
    except ConfigError:
        return False
    return True
