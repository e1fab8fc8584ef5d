"""A run that is out of memory: said so, with what would help and how much."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from dtune.config.run import RunConfig
from dtune.config.support import check_run
from dtune.errors import ConfigError
from dtune.measure.memory import GIB
from dtune.optim.schema import OPTIM
from dtune.parallel.footprint import Footprint
from dtune.parallel.schema import PARALLEL
from dtune.patch.schema import Backend
from dtune.plan.memory import MemoryPlan
from dtune.plan.run import Planner
from dtune.quant.schema import QUANT
from dtune.runtime.capabilities import is_installed
from dtune.runtime.logs import log
from dtune.runtime.schema import Recompute
from dtune.runtime.watch.heartbeat import current_micro
from dtune.train.trainer import Trainer
from dtune.types import Batch

NAMED = 3
"""Settings that are named where memory runs out."""

# What allocators say that raise no error of their own kind.
_WORDS = ("can't allocate memory", "cublas_status_alloc_failed", "cuda error: out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory of the device or of the host is used up."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


def describe_shortage(error: BaseException, trainer: Trainer | None) -> str:
    """What ran out, and at which batch."""
    first = str(error).strip().splitlines()
    said = first[0].rstrip(".") if first else type(error).__name__
    message = f"out of memory: {said}."
    batch = current_batch(trainer)
    if trainer is None or batch is None:
        return message
    rows, width = batch.input_ids.shape
    lengths = ", ".join(map(str, lengths_of(batch, trainer)))
    return (
        f"{message} At micro batch {current_micro() + 1} of {len(trainer.batches)}: {rows} rows x "
        f"{width} tokens, of lengths {lengths}"
    )


def current_batch(trainer: Trainer | None) -> Batch | None:
    """The micro batch that was being done; None before the first."""
    if trainer is None or not trainer.batches:
        return None
    return trainer.batches[min(current_micro(), len(trainer.batches) - 1)]


def lengths_of(batch: Batch, trainer: Trainer) -> list[int]:
    """Tokens of every sequence of a micro batch."""
    lengths = trainer.loader.dataset.lengths
    return [sum(int(lengths[row]) for row in rows) for rows in batch.rows]


@dataclass(frozen=True)
class Remedy:
    """A setting, and what it would save on the fullest rank."""

    setting: str
    saves: int

    def __str__(self) -> str:
        unit, size = ("GiB", GIB) if self.saves >= GIB // 100 else ("MiB", 1 << 20)
        return f"{self.setting} saves {self.saves / size:.2f} {unit}"


def advise(run: RunConfig, trainer: Trainer | None, *, seconds: float) -> str:
    """The three settings that would save most at this batch, by the plan of memory.

    Counts for about so many seconds at most; nothing where nothing was counted by then.
    """
    batch = current_batch(trainer)
    if trainer is None or batch is None:
        return ""
    level = log.level
    # What building a model says would look as if the run went on.
    log.setLevel(logging.ERROR)
    try:
        counter = Counter(run, batch, trainer.world.size, time.monotonic() + seconds)
        remedies = counter.count()
    finally:
        log.setLevel(level)
    if not remedies:
        return "`dtune plan` with the settings of the run says what takes how much"
    best = sorted(remedies, key=lambda remedy: -remedy.saves)[:NAMED]
    return f"By the plan for this batch, {'; '.join(map(str, best))}"


class Counter:
    """Counts the memory of a run under other settings until a deadline.

    Most settings are counted on the model of the run itself; what needs another model, or another
    pass, is left out where there is no time for it. Until NAMED are found passes are awaited.
    """

    def __init__(self, run: RunConfig, batch: Batch, ranks: int, deadline: float) -> None:
        self._run = run
        self._batch = batch
        self._ranks = ranks
        self._deadline = deadline
        self._gpu = torch.cuda.is_available()
        self._building = self._tracing = 0.0

    def count(self) -> list[Remedy]:
        """What helps, of all that was counted in time."""
        planner = self._planner(self._run)
        if planner is None or (now := self._memory(planner, self._run, awaited=True)) is None:
            return []
        found = list(self._of_less(now))
        for setting, other in self._other_engines():
            if self._holds(other):
                found.append(Remedy(setting, self._saved(now, planner.held(other))))
        for setting, other in self._other_passes():
            awaited = sum(remedy.saves > 0 for remedy in found) < NAMED
            if self._holds(other) and (plan := self._memory(planner, other, awaited=awaited)):
                found.append(Remedy(setting, now.device_bytes - plan.device_bytes))
        for setting, other in self._other_bases():
            if self._holds(other) and (another := self._planner(other)):
                found.append(Remedy(setting, self._saved(now, another.held(other))))
        for setting, other in self._other_kernels():
            another = self._planner(other) if self._holds(other) else None
            if another and (plan := self._memory(another, other)):
                found.append(Remedy(setting, now.device_bytes - plan.device_bytes))
        return [remedy for remedy in found if remedy.saves > 0]

    def _of_less(self, now: MemoryPlan) -> Iterator[Remedy]:
        """Activations are in proportion to the tokens of a micro batch; the rest is one number."""
        rows, width = self._batch.input_ids.shape
        saved, train = now.saved.activations, self._run.train
        if train.micro_batch_size > 1:
            half = train.micro_batch_size // 2
            saves = saved * max(0, rows - half) // rows
            yield Remedy(f"train.micro_batch_size={half}", saves)
        length = self._run.data.max_length // 2
        if width > length:
            yield Remedy(f"data.max_length={length}", saved * (width - length) // width)
        if now.kept:
            yield Remedy("quant.cache_gib=0", now.kept)

    @staticmethod
    def _saved(now: MemoryPlan, held: Footprint) -> int:
        """By holding other things, with passes that save the same."""
        copies = now.saved.copies if now.held.autocasts and not held.autocasts else 0
        return now.held.device_bytes + copies - held.device_bytes

    def _other_engines(self) -> Iterator[tuple[str, RunConfig]]:
        """Of the same model: no pass is counted anew."""
        run = self._run
        if self._ranks > 1 and run.parallel.name not in ("fsdp", "zero3"):
            yield "parallel=fsdp", replace(run, parallel=PARALLEL.config("fsdp")())
        if self._gpu and vars(run.parallel).get("cpu_offload") is False:
            # A field of some engines only, which their common base does not know.
            engine: Any = run.parallel
            other = replace(engine, cpu_offload=True)
            yield "parallel.cpu_offload=true", replace(run, parallel=other)
        if self._gpu and run.optim.name == "adamw" and is_installed("bitsandbytes"):
            yield "optim=adamw8bit", replace(run, optim=OPTIM.config("adamw8bit")())

    def _other_passes(self) -> Iterator[tuple[str, RunConfig]]:
        """Of the same model."""
        run, train = self._run, self._run.train
        if train.recompute is not Recompute.full:
            other = replace(train, recompute=Recompute.full)
            yield "train.recompute=full", replace(run, train=other)
        if self._gpu and not train.offload_activations:
            other = replace(train, offload_activations=True)
            yield "train.offload_activations=true", replace(run, train=other)

    def _other_bases(self) -> Iterator[tuple[str, RunConfig]]:
        """Of another model, with the same passes."""
        if self._run.quant.name == "none":
            yield "quant=nf4", replace(self._run, quant=QUANT.config("nf4")())

    def _other_kernels(self) -> Iterator[tuple[str, RunConfig]]:
        """Of another model, with other passes."""
        run = self._run
        if self._gpu and run.kernels.name is Backend.torch:
            other = replace(run.kernels, name=Backend.auto)
            yield "kernels=auto", replace(run, kernels=other)

    def _holds(self, run: RunConfig) -> bool:
        try:
            check_run(run, self._ranks)
        except ConfigError:
            return False
        return True

    def _planner(self, run: RunConfig) -> Planner | None:
        """None where building would take too long, or it cannot be planned."""
        start = time.monotonic()
        if start + self._building > self._deadline:
            return None
        device = torch.device("cuda" if self._gpu else "cpu")
        try:
            return Planner(run, self._ranks, None, device=device)
        except ConfigError:
            return None
        finally:
            self._building = max(self._building, time.monotonic() - start)

    def _memory(
        self, planner: Planner, run: RunConfig, *, awaited: bool = False
    ) -> MemoryPlan | None:
        """None where a pass would take too long and is not ``awaited``, or cannot be counted."""
        start = time.monotonic()
        if not awaited and start + self._tracing > self._deadline:
            return None
        try:
            return planner.memory(run, self._batch)
        except ConfigError:
            return None
        finally:
            self._tracing = max(self._tracing, time.monotonic() - start)
