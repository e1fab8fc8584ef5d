"""One forward and backward pass on tensors without values: what it holds, computes and moves."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dtune.measure.operations import Operation, cost_of
from dtune.measure.values import Unknown, Values
from dtune.types import Batch

_COPY = torch.ops.aten._to_copy.default
_ZEROS = torch.ops.aten.new_zeros.default
_ADD_AT, _ADD = torch.ops.aten.index_put.default, torch.ops.aten.add.Tensor
_IN_PLACE = {
    _ADD_AT: torch.ops.aten.index_put_.default,
    _ADD: torch.ops.aten.add_.Tensor,
}
_ALIGNED = 128
"""Rows of logits are padded to at most a multiple of so many elements."""


class Alive(NamedTuple):
    """Bytes at one moment that operations of the pass have made."""

    total: int
    """All but gradients of parameters."""
    gradients: int


@dataclass(frozen=True)
class Passes:
    """Bytes and work of one micro batch: bytes besides parameters, their gradients, the batch."""

    activations: int
    """Alive between forward and backward, with the logits, without ``copies``."""
    copies: int
    """Copies of weights in another dtype, which autocast keeps until the end of the step."""
    logits: int
    """Of the activations, what is as wide as the vocabulary."""
    offloaded: int
    """Left the device between forward and backward."""
    forward: int
    """The most at once in forward."""
    early: int
    """The most at once in backward until the last block is through."""
    late: int
    """The most at once after that."""
    early_filling: int
    """As ``early``, together with the gradients there are by then."""
    late_filling: int
    """As ``late``, together with the gradients there are by then."""
    wide: int = 0
    """The most at once that is as wide as the vocabulary: logits, or those of a chunk."""
    operations: Mapping[Operation, int] = field(default_factory=Counter)
    """What runs on the device, and how often."""

    @property
    def peak(self) -> int:
        """The most at once, gradients apart."""
        return max(self.forward, self.early, self.late)

    @property
    def peak_filling(self) -> int:
        """The most at once together with the gradients there are by then."""
        return max(self.forward, self.early_filling, self.late_filling)

    def plus(self, other: Self, times: int) -> Self:
        """``self + times * other``, which may have negative numbers."""
        numbers = {
            one.name: getattr(self, one.name) + times * getattr(other, one.name)
            for one in dataclasses.fields(self)
            if one.name != "operations"
        }
        operations = Counter(self.operations)
        for operation, count in other.operations.items():
            operations[operation] += times * count
        return dataclasses.replace(self, **numbers, operations=operations)


class PassTally(TorchDispatchMode):
    """Follows every storage that an operation inside of it makes until nobody holds it any more.

    Not those of parameters and of what there is ``besides``, which operations return as well.
    """

    def __init__(
        self,
        *,
        parameters: Iterable[torch.Tensor],
        besides: Iterable[torch.Tensor],
        vocabulary: int,
        values: Values,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._values = values
        self._sources = {_address(tensor) for tensor in parameters}
        self._others = self._sources | {_address(tensor) for tensor in besides}
        self._vocabulary = vocabulary
        # By the storage's address, which is another's only after it has been forgotten.
        self._sizes: dict[int, int] = {}
        self._watchers: dict[int, weakref.ref[Any]] = {}
        self._copies: set[int] = set()
        # With the moment since which it has been there.
        self._wide: dict[int, int] = {}
        self._gradients: set[int] = set()
        self._live = self._live_gradients = self._live_wide = 0
        self._zeros: int | None = None
        self.is_backward = False
        self._wide_series: list[int] = []
        self.operations: Counter[Operation] = Counter()
        self.series: list[Alive] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation, and note what it returns and costs."""
        kwargs = kwargs or {}
        with suppress(Unknown):
            return self._values.read(func, args)
        if self._adds_up(func, args, kwargs):
            func = _IN_PLACE[func]
        results = func(*args, **kwargs)
        self._values.follow(func, args, kwargs, results)
        is_copy = func is _COPY and _address(args[0]) in self._sources
        for leaf in tree_leaves(results):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self._note(leaf, is_copy=is_copy)
                self._zeros = _address(leaf) if func is _ZEROS else None
        if operation := cost_of(func, args, kwargs, results, known=self._values.integers):
            self.operations[operation] += 1
        self.mark()
        return results

    def _adds_up(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether autograd would add in place if no mode looked on, and so holds one tensor less.

        It does so for the gradient of an index, and where gradients reach a tensor by several ways.
        Backward formulas of torch's own operations add no tensors that are alike; what a function
        in Python adds is left as it is, and so is a forward that is computed again.
        """
        if func is _ADD_AT:
            return _address(args[0]) == self._zeros
        if func is not _ADD or not self.is_backward or kwargs or torch.is_grad_enabled():
            return False
        if isinstance(torch._C._current_autograd_node(), BackwardCFunction):
            return False
        one, other = args
        is_alike = isinstance(other, torch.Tensor) and one.shape == other.shape
        return is_alike and one.dtype == other.dtype

    def mark(self) -> None:
        """Note what is alive now."""
        self.series.append(Alive(self._live - self._live_gradients, self._live_gradients))
        self._wide_series.append(self._live_wide)

    def _note(self, tensor: torch.Tensor, *, is_copy: bool) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._sizes or address in self._others:
            return
        self._watchers[address] = weakref.ref(storage, partial(self._forget, address))
        self._sizes[address] = storage.nbytes()
        self._live += storage.nbytes()
        if is_copy:
            self._copies.add(address)
        width = tensor.shape[-1] if tensor.ndim else 0
        if 0 <= width - self._vocabulary < _ALIGNED and not is_copy:
            self._wide[address] = len(self.series)
            self._live_wide += storage.nbytes()

    def _forget(self, address: int, reference: weakref.ref[Any]) -> None:
        size = self._sizes.pop(address)
        del self._watchers[address]
        self._live -= size
        if address in self._gradients:
            self._live_gradients -= size
        if self._wide.pop(address, None) is not None:
            self._live_wide -= size
        for kind in (self._gradients, self._copies):
            kind.discard(address)

    def is_gradient(self, tensor: torch.Tensor) -> None:
        """Note that a tensor is a parameter's gradient."""
        address = _address(tensor)
        if address in self._sizes and address not in self._gradients:
            self._gradients.add(address)
            self._live_gradients += self._sizes[address]
            self._is_not_wide(address)

    def _is_not_wide(self, address: int) -> None:
        """Take back that a storage holds logits: it is the gradient of the head."""
        since = self._wide.pop(address, None)
        if since is None:
            return
        size = self._sizes[address]
        self._live_wide -= size
        for moment in range(since, len(self._wide_series)):
            self._wide_series[moment] -= size

    @property
    def alive(self) -> int:
        """Bytes that are alive now."""
        return self._live

    def alive_copies(self) -> int:
        """Bytes of those that are copies of parameters in another dtype."""
        return sum(self._sizes[address] for address in self._copies)

    def alive_logits(self) -> int:
        """Bytes of those that are as wide as the vocabulary."""
        return self._live_wide

    @property
    def most_wide(self) -> int:
        """The most bytes at once of those so far."""
        return max(self._wide_series, default=0)


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _batch_in(batch: Batch, mode: FakeTensorMode, device: torch.device, values: Values) -> Batch:
    fakes: dict[str, Any] = {}
    for name, real in vars(batch).items():
        if isinstance(real, torch.Tensor):
            with mode:
                fakes[name] = torch.empty(real.shape, dtype=real.dtype, device=device)
            values.tell(fakes[name], real)
    return dataclasses.replace(batch, **fakes)


def _tensors(batch: Batch) -> list[torch.Tensor]:
    return [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]


@dataclass(frozen=True)
class Setting:
    """How a pass is run."""

    mode: FakeTensorMode
    """That the model's parameters are of."""
    device: torch.device
    """Decides which of torch's implementations run."""
    autocast: torch.dtype | None
    """Dtype of autocast around the forward pass; None: there is none."""
    vocabulary: int
    """Columns of the head."""

    def computing(self) -> AbstractContextManager[Any]:
        """Around the forward pass."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)


def count_passes(
    model: nn.Module,
    batch: Batch,
    loss: Callable[[nn.Module, Batch], torch.Tensor],
    setting: Setting,
    *,
    besides: Iterable[torch.Tensor],
    last_block: nn.Module | None,
    offloaded: Callable[[], int],
) -> Passes:
    """Run forward and backward of one micro batch as the device would, without memory or values.

    A storage that an operation made counts once, as long as autograd or anybody holds it.

    Args:
        model: Of parameters and buffers without values, of the setting's mode.
        batch: On the CPU.
        loss: Forward and loss.
        setting: How it is run.
        besides: What there is besides parameters, buffers and the batch.
        last_block: Whose backward is the first of all blocks'.
        offloaded: Bytes that have left the device when the forward pass is through.
    """
    values = Values()
    inputs = _batch_in(batch, setting.mode, setting.device, values)
    parameters = list(model.parameters())
    tally = PassTally(
        parameters=parameters,
        besides=[*model.buffers(), *_tensors(inputs), *besides],
        vocabulary=setting.vocabulary,
        values=values,
    )
    model.train()
    split = _Split(tally, last_block)
    with _gradients_noted(tally, parameters, split.hooks), setting.mode, tally, setting.computing():
        result = loss(model, inputs)
        total, copies = tally.alive, tally.alive_copies()
        logits, left = tally.alive_logits(), offloaded()
        forward = len(tally.series)
        tally.is_backward = True
        # As engines do it: inside of autocast, which keeps its copies until both are through.
        with torch.autocast(setting.device.type, enabled=False):
            result.backward()
    during, before, after = split.cut(forward)
    return Passes(
        activations=total - copies,
        copies=copies,
        logits=logits,
        offloaded=left,
        forward=_most(during),
        early=_most(before),
        late=_most(after),
        early_filling=_filling(before),
        late_filling=_filling(after),
        wide=tally.most_wide,
        operations=tally.operations,
    )


@contextmanager
def _gradients_noted(
    tally: PassTally, parameters: Sequence[nn.Parameter], more: Sequence[Any]
) -> Iterator[None]:
    """Tell the tally of each gradient; in the end take these and ``more`` hooks away, and them."""

    def note(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            tally.is_gradient(parameter.grad)

    trained = [p for p in parameters if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(note) for p in trained]
    try:
        yield
    finally:
        for hook in [*hooks, *more]:
            hook.remove()
        for parameter in parameters:
            parameter.grad = None


def _most(series: list[Alive]) -> int:
    return max((alive.total for alive in series), default=0)


def _filling(series: list[Alive]) -> int:
    return max((alive.total + alive.gradients for alive in series), default=0)


class _Split:
    """Finds the moment at which the backward of the last block is through."""

    def __init__(self, tally: PassTally, last_block: nn.Module | None) -> None:
        self._tally = tally
        self._at: int | None = None
        self.hooks: list[Any] = []
        if last_block is not None:
            self.hooks.append(last_block.register_forward_pre_hook(self._watch))

    def _watch(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        hidden = args[0] if args else None
        if self._at is None and isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            self.hooks.append(hidden.register_hook(self._note))

    def _note(self, gradient: torch.Tensor) -> None:
        if self._at is None:
            self._at = len(self._tally.series)

    def cut(self, forward: int) -> tuple[list[Alive], list[Alive], list[Alive]]:
        """The series of forward, which has so many moments, and until and after the split."""
        series = self._tally.series
        at = len(series) if self._at is None else self._at
        return series[:forward], series[forward:at], series[at:]
