"""A run that is out of memory: said so, with what would help and how much."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from dtune.build import BuiltModel, build_trained_model
from dtune.config.run import RunConfig
from dtune.config.support import accumulation_steps, check_run
from dtune.errors import ConfigError
from dtune.measure.memory import GIB
from dtune.optim.schema import OPTIM
from dtune.parallel.footprint import Footprint
from dtune.parallel.schema import PARALLEL
from dtune.patch.schema import Backend
from dtune.plan.memory import (
    MemoryPlan,
    MemoryRequest,
    plain_loss,
    plan_held,
    plan_memory,
    request_of,
)
from dtune.quant.schema import QUANT
from dtune.runtime.capabilities import is_installed
from dtune.runtime.logs import log
from dtune.runtime.schema import Recompute
from dtune.runtime.watch.heartbeat import current_micro
from dtune.train.trainer import Trainer
from dtune.types import Batch

T = TypeVar("T")

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
    best = sorted(remedies, key=lambda remedy: -remedy.saves)[:3]
    return f"By the plan for this batch, {'; '.join(map(str, best))}"


class Counter:
    """Counts the memory of a run under other settings until a deadline."""

    def __init__(self, run: RunConfig, batch: Batch, ranks: int, deadline: float) -> None:
        self._run = run
        self._batch = batch
        self._ranks = ranks
        self._deadline = deadline
        self._longest = 0.0
        self._gpu = torch.cuda.is_available()

    def count(self) -> list[Remedy]:
        """What helps, of all that was counted in time."""
        now = self._timed(lambda: self._plan(self._run))
        if now is None:
            return []
        found = [*self._of_less_data(now), *self._of_engines(now)]
        for setting, other in self._other_passes():
            if self._holds(other):
                plan = self._timed(lambda other=other: self._plan(other))  # type: ignore[misc]
                if plan is not None:
                    found.append(Remedy(setting, now.device_bytes - plan.device_bytes))
        return [remedy for remedy in found if remedy.saves > 0]

    def _of_less_data(self, now: MemoryPlan) -> Iterator[Remedy]:
        """Activations are in proportion to the tokens of a micro batch."""
        rows, width = self._batch.input_ids.shape
        saved, train = now.saved.activations, self._run.train
        if train.micro_batch_size > 1:
            half = train.micro_batch_size // 2
            saves = saved * max(0, rows - half) // rows
            yield Remedy(f"train.micro_batch_size={half}", saves)
        length = self._run.data.max_length // 2
        if width > length:
            yield Remedy(f"data.max_length={length}", saved * (width - length) // width)

    def _of_engines(self, now: MemoryPlan) -> Iterator[Remedy]:
        """What needs no forward pass to be counted."""
        for setting, other in self._other_storage():
            if not self._holds(other):
                continue
            held = self._timed(lambda other=other: self._held(other))  # type: ignore[misc]
            if held is not None:
                copies = now.saved.copies if now.held.autocasts and not held.autocasts else 0
                yield Remedy(setting, now.held.device_bytes + copies - held.device_bytes)

    def _other_storage(self) -> Iterator[tuple[str, RunConfig]]:
        run = self._run
        if run.quant.name == "none":
            yield "quant=nf4", replace(run, quant=QUANT.config("nf4")())
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
        run, train = self._run, self._run.train
        if train.recompute is not Recompute.full:
            other = replace(train, recompute=Recompute.full)
            yield "train.recompute=full", replace(run, train=other)
        if self._gpu and not train.offload_activations:
            other = replace(train, offload_activations=True)
            yield "train.offload_activations=true", replace(run, train=other)
        if self._gpu and run.kernels.name is Backend.torch:
            other_kernels = replace(run.kernels, name=Backend.auto)
            yield "kernels=auto", replace(run, kernels=other_kernels)

    def _holds(self, run: RunConfig) -> bool:
        try:
            check_run(run, self._ranks)
        except ConfigError:
            return False
        return True

    def _plan(self, run: RunConfig) -> MemoryPlan:
        built, request = self._build(run)
        return plan_memory(built.model, built.spec, request, self._batch, plain_loss)

    def _held(self, run: RunConfig) -> Footprint:
        built, request = self._build(run)
        return plan_held(built.model, built.spec, request)

    def _build(self, run: RunConfig) -> tuple[BuiltModel, MemoryRequest]:
        built = build_trained_model(run, load=False)
        accumulates = accumulation_steps(run, self._ranks) > 1
        return built, request_of(run, built, self._ranks, accumulates=accumulates)

    def _timed(self, act: Callable[[], T]) -> T | None:
        """What ``act`` gives; None where it would take too long, or it cannot be counted."""
        start = time.monotonic()
        if start + self._longest > self._deadline:
            return None
        try:
            return act()
        except (ConfigError, DataDependentOutputException, DynamicOutputShapeException):
            return None
        finally:
            self._longest = max(self._longest, time.monotonic() - start)
