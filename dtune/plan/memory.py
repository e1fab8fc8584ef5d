"""What the fullest rank of a run holds, counted: for ``dtune plan``, and where memory runs out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from dtune.build import BuiltModel
from dtune.config.run import RunConfig
from dtune.measure.memory import GIB
from dtune.measure.passes import Passes
from dtune.measure.storages import distinct_bytes
from dtune.objectives.causal import causal_loss
from dtune.optim.schema import OptimConfig, same_rate
from dtune.parallel.base import COMPUTE_DTYPES
from dtune.parallel.footprint import Footprint, Planned
from dtune.parallel.schema import ParallelConfig
from dtune.plan.trace import Regime, Tracer, kept_weights
from dtune.quant.layout import CODES, PARTS
from dtune.runtime.schema import Precision, Recompute
from dtune.types import IGNORE_INDEX, Batch, ModelSpec, PeftMethod, TakesPartInSteps

LIBRARIES = 64 << 20
"""Workspaces of cuBLAS, which torch allocates: 32 MiB on Hopper, for forward and for backward."""
CONTEXT = 600 << 20
"""The CUDA context with torch's kernels, outside of what torch allocates."""
COLLECTIVES = 1 << 30
"""Buffers of NCCL."""
UNUSABLE = 0.05
"""Of what is allocated, what more the allocator reserves in pieces that fit nothing."""


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
    """Whose implementations of operations run."""
    rate_factor: Callable[[str], float] = same_rate
    on_gpu: bool = False
    """Whether it is planned for a GPU, of whichever device the operations are."""
    method_state: int = 0
    """Bytes that the method keeps from step to step."""


class Part(NamedTuple):
    """Bytes of one thing that a rank holds: at least, probably, at most."""

    name: str
    low: int
    likely: int
    high: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one rank."""

    held: Footprint
    saved: Passes
    accumulates: bool
    """Whether gradients are there while the next forward runs."""
    ranks: int
    scales: float
    """Of the frozen weights' bytes, the part that is scales of a quantised base."""
    kept: int
    """Weights that stay dequantised beside their bytes."""
    buffers: int
    """Of the model, whole on every rank."""
    method_state: int
    """What the method keeps from step to step."""
    on_gpu: bool

    def _of_device(self, name: str) -> int:
        """What of the footprint is on the device. A CPU has no other memory to offload to."""
        size: int = vars(self.held)[name]
        return 0 if self.on_gpu and name in self.held.host else size

    @property
    def gradients(self) -> int:
        """On the device."""
        return self._of_device("gradients")

    @property
    def waiting(self) -> int:
        """What the passes leave for backward."""
        return self.saved.activations + self.saved.copies

    @property
    def device_bytes(self) -> int:
        """All that is on the device at once, at the end of the forward pass."""
        held = self.held
        always = sum(map(self._of_device, ("frozen", "masters", "copies", "optimizer")))
        passing = held.gathered + held.buckets
        beside = self.kept + self.buffers + self.method_state
        return always + beside + self.gradients + passing + self.waiting

    @property
    def workspace(self) -> int:
        """What blocks, head and loss need while they run, beyond what waits for backward."""
        return max(0, self.saved.peak - self.waiting)

    @property
    def freed(self) -> int:
        """Of activations, what is gone before the last gradient is there.

        Known where a rank has all gradients as they come, and where a block's are reduced when
        backward leaves it; else it is left out.
        """
        saved, buckets = self.saved, 0
        if self.held.reduces_late:
            buckets = self.held.buckets
            before = self.gradients if self.accumulates else 0
            early = before + max(saved.forward, saved.early_filling)
            peak = max(early, self.gradients + buckets + saved.late)
        elif self.held.autocasts and not self.accumulates:
            peak = max(saved.peak_filling, self.gradients)
        else:
            return 0
        return max(0, self.gradients + buckets + max(saved.peak, self.waiting) - peak)

    @property
    def afterwards(self) -> int:
        """What the last reductions or the step take beyond what the passes took, now free."""
        held = self.held
        passes = held.gathered + held.buckets + self.waiting + self.workspace - self.freed
        return max(0, held.afterwards - passes)

    def parts(self) -> list[Part]:
        """What takes how much; the sums of the columns are low, likely and high."""
        held, saved = self.held, self.saved
        frozen = self._of_device("frozen")
        scales = round(frozen * self.scales)
        before = self.gradients if self.accumulates else 0
        least = max(before, self.gradients - self.waiting)
        exact = [
            ("frozen weights", frozen - scales),
            ("quantisation scales", scales),
            ("weights kept dequantised", self.kept),
            ("buffers", self.buffers),
            ("trained parameters", self._of_device("masters")),
            ("  in the compute dtype", self._of_device("copies")),
            ("optimizer state", self._of_device("optimizer")),
            ("state of the method", self.method_state),
            ("saved activations", saved.activations - saved.logits),
            ("saved logits", saved.logits),
            ("  weights cast by autocast", saved.copies),
        ]
        at_most = [
            ("gathered weights", held.gathered),
            ("reduce buffers", held.buckets),
            ("workspace of a block or the head", self.workspace),
            ("  gone before all gradients are there", -self.freed),
            ("more when activations are gone", self.afterwards),
            ("workspaces of libraries", LIBRARIES if self.on_gpu else 0),
        ]
        parts = [
            *(Part(name, size, size, size) for name, size in exact),
            Part("gradients", least, self.gradients, self.gradients),
            *(Part(name, 0, size, size) for name, size in at_most),
        ]
        if self.on_gpu:
            allocated = sum(part.likely for part in parts)
            context = CONTEXT + (COLLECTIVES if self.ranks > 1 else 0)
            parts.append(Part("CUDA context, NCCL", 0, 0, context))
            parts.append(Part("unusable pieces", 0, 0, math.ceil(allocated * UNUSABLE)))
        return [part for part in parts if part.high or part.likely or part.low]

    @property
    def low(self) -> int:
        """What is the run's own, and alive at once."""
        return sum(part.low for part in self.parts())

    @property
    def likely(self) -> int:
        """The peak of what torch allocates."""
        return sum(part.likely for part in self.parts())

    @property
    def high(self) -> int:
        """What the device should have."""
        return sum(part.high for part in self.parts())

    @property
    def host_bytes(self) -> int:
        """In host memory: what is offloaded."""
        return self.saved.offloaded + (self.held.host_bytes if self.on_gpu else 0)

    def rows(self) -> list[str]:
        """The parts as a table, as ``dtune plan`` prints it."""
        total = Part("total on the device", self.low, self.likely, self.high)
        shown = [*self.parts(), total]
        width = max(len(part.name) for part in shown)
        head = f"{'GiB':<{width}}  {'low':>10}{'likely':>10}{'high':>10}{'likely, bytes':>20}"
        rows = [head, *(_row(part, width) for part in shown)]
        if wide := self.saved.wide:
            rows.append(f"of it logits, or those of a chunk: at most {_in_full(wide)} at once")
        if self.host_bytes:
            rows.append(f"in host memory: {_in_full(self.host_bytes)}")
        return rows


def _in_full(size: int) -> str:
    return f"{size / GIB:.3f} GiB, {size:,} bytes"


def _row(part: Part, width: int) -> str:
    sizes = "".join(f"{size / GIB:10.3f}" for size in part[1:])
    return f"{part.name:<{width}}  {sizes}{part.likely:>20,}"


def plan_memory(
    model: nn.Module,
    spec: ModelSpec,
    request: MemoryRequest,
    batch: Batch,
    loss: Callable[[nn.Module, Batch], torch.Tensor],
    *,
    tracer: Tracer | None = None,
) -> MemoryPlan:
    """Count the memory of a model on the meta device, which is of no other use afterwards.

    Args:
        model: With its method in place.
        spec: Facts about it.
        request: How it is trained.
        batch: One micro batch, on the CPU.
        loss: Forward and loss.
        tracer: Of the model, where it has been counted before.
    """
    held = plan_held(model, spec, request)
    tracer = tracer or Tracer(model, spec, request.device)
    saved = tracer.count(batch, loss, regime_of(request, held))
    return MemoryPlan(
        held,
        saved,
        accumulates=request.accumulates or held.gradients_stay,
        ranks=request.ranks,
        scales=share_of_scales(model),
        kept=sum(weight.nbytes for weight in kept_weights(model)),
        buffers=distinct_bytes(model.buffers()),
        method_state=request.method_state,
        on_gpu=request.on_gpu,
    )


def regime_of(request: MemoryRequest, held: Footprint) -> Regime:
    """What of a request changes the passes."""
    compute = COMPUTE_DTYPES[request.precision]
    return Regime(request.recompute, request.offload, compute, held.autocasts)


def share_of_scales(model: nn.Module) -> float:
    """Of the bytes of frozen parameters, the part that is scales of quantised weights."""
    scales = total = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        size, leaf = parameter.numel() * parameter.itemsize, name.rpartition(".")[2]
        total += size
        scales += size if leaf in PARTS and leaf != CODES else 0
    return scales / total if total else 0.0


def planned_of(model: nn.Module, spec: ModelSpec, request: MemoryRequest) -> Planned:
    """What engines need to know to say what they hold and send; leaves the model as it is."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return Planned(
        model,
        spec,
        request.optim.build(trained, rate_factor=request.rate_factor),
        request.optim.state_of,
        lambda size: request.optim.alignment(size, on_gpu=request.on_gpu),
        lambda numel, decays: request.optim.stepping(numel, decays=decays),
        request.precision,
        request.ranks,
        request.accumulates,
    )


def plan_held(model: nn.Module, spec: ModelSpec, request: MemoryRequest) -> Footprint:
    """Count what a rank holds besides activations; leaves the model as it is."""
    return request.parallel.footprint(planned_of(model, spec, request))


def request_of(
    run: RunConfig, built: BuiltModel, ranks: int, *, accumulates: bool, for_gpu: bool = False
) -> MemoryRequest:
    """What decides the memory of a composed run; ``for_gpu``: also where this machine has none."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    method = built.method
    state = method.state() if isinstance(method, TakesPartInSteps) else {}
    return MemoryRequest(
        run.parallel,
        run.optim,
        run.precision.name,
        run.train.recompute,
        run.train.offload_activations,
        ranks,
        accumulates,
        device,
        method.rate_factor,
        on_gpu=for_gpu or device.type == "cuda",
        method_state=sum(tensor.nbytes for tensor in state.values()),
    )


def full_batch(rows: int, width: int, *, documents: int = 2) -> Batch:
    """A micro batch of packed rows of so many documents, trained on all that can be predicted.

    Two documents are the fewest with which attention holds what packed rows have it hold.
    """
    length = -(-width // documents)
    places = torch.arange(width)
    position_ids = (places % length).expand(rows, width)
    labels = torch.where(position_ids == 0, IGNORE_INDEX, 0)
    return Batch(
        input_ids=torch.zeros((rows, width), dtype=torch.long),
        labels=labels,
        position_ids=position_ids,
        document_ids=(places // length).expand(rows, width),
        attention_mask=None,
        rows=((),) * rows,
        num_tokens=rows * width,
        num_targets=int((labels != IGNORE_INDEX).sum()),
    )


def mean_length_of(batch: Batch) -> float:
    """Of the documents of a batch, weighted by tokens."""
    starts = (batch.position_ids == 0).flatten().nonzero().flatten().tolist()
    lengths = [stop - start for start, stop in pairwise([*starts, batch.num_slots])]
    return float(sum(length * length for length in lengths) / batch.num_slots)


def plain_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Loss of next tokens; its memory is that of every objective."""
    return causal_loss(model, batch).total


def loss_of(method: PeftMethod) -> Callable[[nn.Module, Batch], torch.Tensor]:
    """The same with the penalty of a method that has one, whose gradients wait in backward."""
    if not isinstance(method, TakesPartInSteps):
        return plain_loss
    return lambda model, batch: plain_loss(model, batch) + method.penalty()
