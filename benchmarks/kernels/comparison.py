"""What is compared: one computation done by dtune and by others, on operands of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from dtune_kernels.catalog import CATALOG
from dtune_kernels.check import tensors_in
from dtune_kernels.launch import recorded
from dtune_kernels.library import Shape
from dtune_kernels.timing import Ceilings, Timing, measure, num_copies
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

ALLOWED_DIFFERENCE = 0.05
"""Relative, in the Frobenius norm, from dtune's result to an alternative's: no more than shows that
both compute the same. How exact the kernels are is what ``dtune kernels check`` measures."""
WITHOUT_LAUNCH = (
    "aten::detach aten::alias aten::_unsafe_view aten::_reshape_alias aten::empty aten::empty_like "
    "aten::new_empty aten::empty_strided aten::new_empty_strided aten::lift_fresh "
    "aten::promote_types"
).split()


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer, and in what to compute it."""

    shape: Shape
    dtype: torch.dtype
    device: torch.device
    compile: bool = False
    """Whether plain PyTorch is also compared as torch.compile makes it."""

    def randn(self, *size: int, scale: float = 1.0, grad: bool = False) -> torch.Tensor:
        """Normal numbers in the layer's dtype."""
        x = torch.randn(size, dtype=self.dtype, device=self.device) * scale
        return x.requires_grad_(grad)


@dataclass(frozen=True)
class Alternative:
    """One way to do it."""

    run: Callable[..., Any]
    """Takes the inputs; returns a tensor, or several."""
    inputs: tuple[torch.Tensor, ...]
    """Those that require a gradient get one."""
    trained: tuple[torch.Tensor, ...] = ()
    """What else gets a gradient, in the order of dtune's."""
    same: bool = True
    """Whether it computes what dtune's does."""
    counts: bool = True
    """Whether its launches are all seen by PyTorch's dispatcher."""


@dataclass(frozen=True)
class Comparison:
    """A computation and who does it: the first is dtune's."""

    alternatives: dict[str, Alternative]
    upstream: tuple[torch.Tensor, ...] = ()
    """Gradients of the outputs; empty where only the forward is timed."""


@dataclass(frozen=True)
class Counted:
    """What PyTorch's dispatcher sees of a call."""

    launches: int
    calls: tuple[tuple[int, int], ...]
    """Bytes and FLOPs of each op of dtune and of each GEMM."""

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds that these calls, one after the other, take at least."""
        return sum(ceilings.seconds(moved, flops) for moved, flops in self.calls)


@dataclass(frozen=True)
class Measured:
    """One alternative, timed."""

    timing: Timing
    launches: int | None
    """None where they cannot be counted."""


@dataclass
class Result:
    """One computation for one layer."""

    case: str
    direction: str
    """``forward``, or ``both``: with the backward."""
    layer: str
    nbytes: int = 0
    """Bytes and FLOPs of dtune's ops and GEMMs."""
    flops: int = 0
    share: float = 0.0
    """Time that these take at the measured ceilings, over the time of dtune's."""
    measured: dict[str, Measured] = field(default_factory=dict)
    """By alternative; dtune's is the first."""
    problem: str = ""
    """Why there are no numbers."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why an alternative has none."""

    def speedup(self, name: str) -> float:
        """Time of an alternative over dtune's."""
        return self.measured[name].timing.median / self.measured["dtune"].timing.median


class _Counter(TorchDispatchMode):
    """Counts launches, also those that a launcher of dtune makes, and what they must do."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.calls: list[tuple[int, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name.startswith("dtune::"):
            self._count_own(name.removeprefix("dtune::"), args)
        elif not (func.is_view or name in WITHOUT_LAUNCH):
            self.launches += 1
            self._count_gemm(name, args)
        return func(*args, **(kwargs or {}))

    def _count_own(self, name: str, args: tuple[Any, ...]) -> None:
        op = CATALOG[name]
        cost = op.cost(*args)
        self.calls.append((cost.read + cost.written, cost.flops))
        meta = tree_map(_on_meta, args)
        with recorded():
            # Makes what the launcher keeps for each device.
            op.triton(*meta)
        inner = _Counter()
        with inner, recorded() as launches:
            op.triton(*meta)
        self.launches += len(launches) + inner.launches

    def _count_gemm(self, name: str, args: tuple[Any, ...]) -> None:
        if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            a, b = tensors[-2:]
            flops = 2 * a.shape[0] * a.shape[1] * b.shape[1]
            size = a.element_size()
            self.calls.append((size * (a.numel() + b.numel() + a.shape[0] * b.shape[1]), flops))


def _on_meta(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def count(run: Callable[[], object]) -> Counted:
    """Run once and count."""
    with _Counter() as counter:
        run()
    return Counted(counter.launches, tuple(counter.calls))


def outputs_and_gradients(
    alternative: Alternative,
    inputs: Sequence[torch.Tensor],
    upstream: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, ...]:
    """Run it forward, and backward if there is an upstream."""
    outputs = tuple(tensors_in(alternative.run(*inputs)))
    if not upstream:
        return outputs
    leaves = [x for x in (*inputs, *alternative.trained) if x.requires_grad]
    return (*outputs, *torch.autograd.grad(outputs, leaves, list(upstream)))


def compare(
    case: str,
    comparison: Comparison,
    layer: Layer,
    ceilings: Ceilings,
    *,
    seconds: float,
    rounds: int | None,
) -> list[Result]:
    """Time a computation forward, and forward and backward, by all alternatives in turn."""
    found = []
    for direction in ("forward", "both"):
        upstream = comparison.upstream if direction == "both" else ()
        if direction == "both" and not upstream:
            continue
        result = Result(case, direction, layer.shape.name)
        found.append(result)
        alternatives = _agreeing(result, comparison.alternatives, upstream)
        if not result.problem:
            _time(result, alternatives, upstream, layer.device, ceilings, seconds, rounds)
    return found


def _agreeing(
    result: Result, alternatives: dict[str, Alternative], upstream: Sequence[torch.Tensor]
) -> dict[str, Alternative]:
    """Leave out who fails, or computes something else than dtune; dtune must agree with someone."""
    own = _fresh(alternatives["dtune"], upstream)
    kept = {"dtune": alternatives["dtune"]}
    agree = []
    for name, alternative in alternatives.items():
        if name == "dtune":
            continue
        try:
            theirs = _fresh(alternative, upstream)
        except Exception as error:  # noqa: BLE001 - others raise anything; it is reported
            result.left_out[name] = described(error)
            continue
        difference = _difference(own, theirs) if alternative.same else ""
        if difference:
            result.left_out[name] = difference
            continue
        kept[name] = alternative
        agree += [name] * alternative.same
    if not agree and any(alternative.same for alternative in list(alternatives.values())[1:]):
        result.problem = "dtune agrees with nobody"
    return kept


def _fresh(alternative: Alternative, upstream: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Results from copies of the operands: some overwrite what they are given."""
    inputs = [_copy(x) for x in alternative.inputs]
    results = outputs_and_gradients(alternative, inputs, [x.clone() for x in upstream])
    return tuple(x.detach() for x in results)


def _difference(own: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> str:
    """How results differ from dtune's by more than rounding; empty if they do not."""
    if len(own) != len(theirs):
        return f"returns {len(theirs)} tensors, dtune {len(own)}"
    for index, pair in enumerate(zip(own, theirs, strict=True)):
        error = relative_difference(*pair)
        if not error <= ALLOWED_DIFFERENCE:
            return f"differs from dtune's by {error:.1e} in result {index}"
    return ""


def described(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".strip().partition("\n")[0]


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """In the Frobenius norm, against the other's."""
    theirs = theirs.detach().float()
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours.float() - theirs).norm() / theirs.norm())


def _time(
    result: Result,
    alternatives: dict[str, Alternative],
    upstream: Sequence[torch.Tensor],
    device: torch.device,
    ceilings: Ceilings,
    seconds: float,
    rounds: int | None,
) -> None:
    calls, counted = {}, {}
    for name, alternative in alternatives.items():
        tensors = (*alternative.inputs, *upstream)
        copies = num_copies(sum(x.numel() * x.element_size() for x in tensors))
        calls[name] = [
            partial(
                outputs_and_gradients,
                alternative,
                [_copy(x) for x in alternative.inputs],
                [x.clone() for x in upstream],
            )
            for _ in range(copies)
        ]
        if alternative.counts:
            counted[name] = count(calls[name][0])
    budget = seconds * len(alternatives)
    times = measure(calls, device, seconds=budget, rounds=rounds)
    result.measured = {
        name: Measured(timing, counted[name].launches if name in counted else None)
        for name, timing in times.items()
    }
    own = counted["dtune"]
    result.nbytes = sum(moved for moved, _ in own.calls)
    result.flops = sum(flops for _, flops in own.calls)
    result.share = own.floor(ceilings) / times["dtune"].median


def _copy(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)
