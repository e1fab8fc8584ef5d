"""What the fullest rank of a run holds, counted: for ``dtune plan``, and where memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from dtune.build import BuiltModel
from dtune.config.run import RunConfig
from dtune.measure.activations import Saved, count_saved
from dtune.measure.memory import GIB
from dtune.objectives.causal import causal_loss
from dtune.optim.schema import OptimConfig, same_rate
from dtune.parallel.base import COMPUTE_DTYPES
from dtune.parallel.footprint import Footprint, Planned
from dtune.parallel.schema import ParallelConfig
from dtune.parallel.wrap import wrap_blocks
from dtune.runtime.schema import Precision, Recompute
from dtune.types import Batch, ModelSpec

Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class MemoryRequest:
    """Everything that decides how much memory a rank takes, besides the model."""

    parallel: ParallelConfig
    optim: OptimConfig
    precision: Precision
    recompute: Recompute
    offload: bool
    ranks: int
    accumulates: bool
    device: torch.device
    rate_factor: Callable[[str], float] = same_rate


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank."""

    held: Footprint
    saved: Saved
    offloaded: int
    """Of the saved activations, in host memory."""

    @property
    def device_bytes(self) -> int:
        """All that is on the device at once, at the end of the forward pass."""
        held = self.held
        own = held.frozen + held.masters + held.copies + held.gradients + held.optimizer
        saved = self.saved.activations + self.saved.copies
        return (0 if held.on_host else own) + held.gathered + held.buckets + saved

    def rows(self) -> Rows:
        """Names and numbers, as ``dtune plan`` prints them."""
        held = self.held
        where = " in host memory" if held.on_host else ""
        rows = [
            ("frozen weights", held.frozen, where),
            ("trained parameters", held.masters, where),
            ("  in the compute dtype", held.copies, where),
            ("gradients", held.gradients, where),
            ("optimizer state", held.optimizer, where),
            ("saved activations", self.saved.activations, ""),
            ("  weights cast by autocast", self.saved.copies, ""),
            ("gathered weights", held.gathered, " at most"),
            ("reduce buffers", held.buckets, ""),
        ]
        shown = [(n, f"{_show(size)}{note}") for n, size, note in rows if size]
        if self.offloaded:
            shown.append(("offloaded activations", f"{_show(self.offloaded)} in host memory"))
        return [*shown, ("total on the device", _show(self.device_bytes))]


def _show(size: int) -> str:
    return f"{size / GIB:8.3f} GiB  {size:>19,} bytes"


def plan_memory(
    model: nn.Module,
    spec: ModelSpec,
    request: MemoryRequest,
    batch: Batch,
    loss: Callable[[nn.Module, Batch], torch.Tensor],
) -> MemoryPlan:
    """Count the memory of a model on the meta device, which is of no other use afterwards.

    Args:
        model: With its method in place.
        spec: Facts about it.
        request: How it is trained.
        batch: One micro batch, on the CPU; only its shapes and counts are read.
        loss: Forward and loss.
    """
    held = plan_held(model, spec, request)
    offloader = wrap_blocks(
        model, spec, recompute=request.recompute, compile_blocks=False, offload=request.offload
    )
    compute = COMPUTE_DTYPES[request.precision]
    offloaded = 0

    def watched(model: nn.Module, batch: Batch) -> torch.Tensor:
        nonlocal offloaded
        result = loss(model, batch)
        offloaded = 0 if offloader is None else offloader.host_bytes
        return result

    saved = count_saved(
        model,
        batch,
        watched,
        trained_dtype=torch.float32 if held.autocasts else compute,
        autocast=compute if held.autocasts and compute is not torch.float32 else None,
        device=request.device,
    )
    return MemoryPlan(held, saved, offloaded)


def plan_held(model: nn.Module, spec: ModelSpec, request: MemoryRequest) -> Footprint:
    """Count what a rank holds besides activations; leaves the model as it is."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    planned = Planned(
        model,
        spec,
        request.optim.build(trained, rate_factor=request.rate_factor),
        request.optim.state_of,
        request.precision,
        request.ranks,
        request.accumulates,
    )
    return request.parallel.footprint(planned)


def request_of(
    run: RunConfig, built: BuiltModel, ranks: int, *, accumulates: bool
) -> MemoryRequest:
    """What decides the memory of a composed run."""
    return MemoryRequest(
        run.parallel,
        run.optim,
        run.precision.name,
        run.train.recompute,
        run.train.offload_activations,
        ranks,
        accumulates,
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        built.method.rate_factor,
    )


def memory_rows(
    run: RunConfig, built: BuiltModel, batch: Batch | None, ranks: int, *, accumulates: bool
) -> Rows:
    """The rows of a composed run. Without data every token of a full micro batch is trained on."""
    request = request_of(run, built, ranks, accumulates=accumulates)
    used = batch or full_batch(run.train.micro_batch_size, run.data.max_length)
    try:
        plan = plan_memory(built.model, built.spec, request, used, plain_loss)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        return [("memory", f"not counted: {built.spec.family} decides by values ({error})")]
    rows, width = used.input_ids.shape
    what = f"fullest of {ranks} ranks, a micro batch of {rows} x {width} tokens, "
    what += f"{used.num_targets:,} of them trained on"
    return [("memory", what), *plan.rows()]


def full_batch(rows: int, width: int) -> Batch:
    """A micro batch of packed rows, two documents each, with every token trained on."""
    empty = torch.zeros((rows, width), dtype=torch.long)
    return Batch(
        input_ids=empty,
        labels=empty,
        position_ids=empty,
        document_ids=empty,
        attention_mask=None,
        rows=((),) * rows,
        num_tokens=rows * width,
        num_targets=rows * width,
        num_documents=2 * rows,
    )


def plain_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Loss of next tokens; its memory is that of every objective."""
    return causal_loss(model, batch).total
