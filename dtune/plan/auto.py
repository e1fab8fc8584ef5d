"""``parallel=auto`` and ``train.recompute=auto``: chosen by what a rank holds of the run itself."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dtune.config.run import RunConfig
from dtune.config.support import check_run
from dtune.errors import ConfigError
from dtune.measure.memory import GIB
from dtune.parallel.schema import AUTO, PARALLEL
from dtune.plan.memory import MemoryPlan
from dtune.plan.run import Planner, UncountableError
from dtune.plan.solve import RECOMPUTE, is_legal
from dtune.runtime.logs import log
from dtune.runtime.schema import Recompute
from dtune.runtime.world import World


@dataclass(frozen=True)
class Decision:
    """What was chosen, and why."""

    run: RunConfig
    reasons: tuple[str, ...]


def asks(run: RunConfig) -> bool:
    """Whether anything is left to be chosen."""
    return run.parallel.name == AUTO or run.train.recompute is Recompute.auto


def decide(planner: Planner, memory: float) -> Decision:
    """Choose engine and recomputation of a planner's run for so many bytes of each rank.

    The first that fits: replicas before shards, and of each the least recomputation. Where even
    the last does not fit by the high estimate it is taken as long as the low one is below.

    Raises:
        ConfigError: Not even the low estimate of the last fits, or nothing can be counted.
    """
    run = planner.run
    if not asks(run):
        return Decision(run, ())
    candidates = _candidates(run, planner.ranks)
    reasons: list[str] = []
    for candidate in candidates:
        plan = _memory(planner, candidate)
        fits = plan.high <= memory
        reasons.append(
            f"{_in_words(run, candidate)}: {plan.high / GIB:.2f} GiB of {memory / GIB:.2f} GiB a "
            f"rank (high), {'fits' if fits else 'does not fit'}"
        )
        if fits:
            return Decision(candidate, tuple(reasons))
    if plan.low > memory:
        raise ConfigError(
            f"nothing that {_keys(run)} can choose fits: {'; '.join(reasons)}, and at least "
            f"{plan.low / GIB:.2f} GiB; lower train.micro_batch_size or data.max_length, set "
            "quant=nf4, or take more ranks"
        )
    reasons.append(f"at least {plan.low / GIB:.2f} GiB, which does: tried as it is")
    return Decision(candidates[-1], tuple(reasons))


def _memory(planner: Planner, candidate: RunConfig) -> MemoryPlan:
    try:
        return planner.memory(candidate)
    except UncountableError as error:
        chosen = _in_words(planner.run, candidate)
        raise ConfigError(
            f"{_keys(planner.run)} goes by what would fit, but {error}; set {chosen}, or another"
        ) from error


def _keys(run: RunConfig) -> str:
    keys = []
    if run.parallel.name == AUTO:
        keys.append("parallel=auto")
    if run.train.recompute is Recompute.auto:
        keys.append("train.recompute=auto")
    return " and ".join(keys)


def _in_words(run: RunConfig, candidate: RunConfig) -> str:
    chosen = []
    if run.parallel.name == AUTO:
        chosen.append(f"parallel={candidate.parallel.name}")
    if run.train.recompute is Recompute.auto:
        chosen.append(f"train.recompute={candidate.train.recompute.value}")
    return " ".join(chosen)


def _candidates(run: RunConfig, ranks: int) -> list[RunConfig]:
    """In the order in which they are tried; those that hold together."""
    engines = [run.parallel]
    if run.parallel.name == AUTO:
        names = ("single",) if ranks == 1 else ("ddp", "fsdp")
        engines = [PARALLEL.config(name)() for name in names]
    asked = run.train.recompute
    levels = RECOMPUTE if asked is Recompute.auto else (asked,)
    found = [
        replace(run, parallel=engine, train=replace(run.train, recompute=level))
        for engine in engines
        for level in levels
    ]
    legal = [one for one in found if is_legal(one, ranks)]
    if not legal:
        try:
            check_run(found[-1], ranks)
        except ConfigError as error:
            raise ConfigError(f"{_keys(run)}: nothing can be chosen: {error}") from error
    return legal


def decide_here(run: RunConfig, world: World) -> RunConfig:
    """The same on the ranks of a run, by the memory of their devices; collective.

    The first rank chooses for all, by the smallest memory of any, and logs why.
    """
    if not asks(run):
        return run
    memory = -world.largest(-memory_of(world.device, world.local_size))
    answer: Decision | str = ""
    if world.is_first:
        answer = _decide_quietly(run, world, memory)
    answer = world.broadcast(answer)
    if isinstance(answer, str):
        raise ConfigError(answer)
    for reason in answer.reasons:
        log.info("%s", reason)
    return answer.run


def _decide_quietly(run: RunConfig, world: World, memory: int) -> Decision | str:
    """What was chosen, or why nothing can be."""
    level = log.level
    # What building a model says comes again when the run builds it.
    log.setLevel(logging.ERROR)
    try:
        return decide(Planner(run, world.size, None, device=world.device), memory)
    except ConfigError as error:
        return str(error)
    finally:
        log.setLevel(level)


CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""What a container or a Slurm job may take of the memory, in bytes, or ``max``."""


def memory_of(device: torch.device, ranks: int) -> int:
    """Bytes that a rank may take of its device: what others leave, and what it has itself.

    Of a CPU, that so many ranks share, its part of the memory that this process may take.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP_LIMIT.read_text(encoding="ascii").strip() if CGROUP_LIMIT.is_file() else "max"
    return (memory if limit == "max" else min(memory, int(limit))) // ranks
