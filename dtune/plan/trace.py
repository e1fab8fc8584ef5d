"""Passes of a whole model, from those of a few of its blocks: deep models take no longer.

A block that is neither the first nor the last of those like it adds what the next one does. So a
run of equal blocks is counted with three and with four of them, which says what each further one
adds, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dtune.measure.passes import Passes, Setting, count_passes
from dtune.parallel.wrap import blocks_of, wrap_blocks
from dtune.peft.prefix import PrefixTokens
from dtune.quant.linear import QuantizedLinear
from dtune.runtime.schema import Recompute
from dtune.types import Batch, ModelSpec

KEPT = 3
"""Blocks of a run of equal ones that are counted: the first and the last may differ."""
MOST_RUNS = 3
"""A model of more runs of equal blocks is counted whole."""

Loss = Callable[[nn.Module, Batch], torch.Tensor]


@dataclass(frozen=True)
class Regime:
    """What of the settings changes the passes."""

    recompute: Recompute
    offload: bool
    compute: torch.dtype
    """Dtype of the forward pass."""
    autocasts: bool
    """Whether fp32 masters are computed with under autocast, and not parameters in ``compute``."""

    @property
    def trained_dtype(self) -> torch.dtype:
        """What trained parameters are computed with, or cast from."""
        return torch.float32 if self.autocasts else self.compute

    @property
    def autocast(self) -> torch.dtype | None:
        """Dtype of autocast around the forward pass; None: there is none."""
        return self.compute if self.autocasts and self.compute is not torch.float32 else None


class Tracer:
    """Counts the passes of a model on the meta device, which is of no other use afterwards."""

    def __init__(self, model: nn.Module, spec: ModelSpec, device: torch.device) -> None:
        self._model = model
        self._spec = spec
        self._device = device
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._trained_dtype: torch.dtype | None = None
        self._blocks = blocks_of(model, spec)
        self._lists = _lists_of(model, self._blocks)
        self._runs = _runs_of(model, self._blocks)
        self._vocabulary = _vocabulary(model)
        self._counted: dict[tuple[object, ...], Passes] = {}

    @property
    def num_blocks(self) -> int:
        """Of the whole model."""
        return len(self._blocks)

    def count(self, batch: Batch, loss: Loss, regime: Regime, *, whole: bool = False) -> Passes:
        """Passes of one micro batch; ``whole``: of every block, with nothing left out."""
        key = (*_shape(batch), loss, regime, whole)
        if key not in self._counted:
            self._counted[key] = self._count_all(batch, loss, regime, whole=whole)
        return self._counted[key]

    def _count_all(self, batch: Batch, loss: Loss, regime: Regime, *, whole: bool) -> Passes:
        if self._trained_dtype is not regime.trained_dtype:
            empty_model(self._model, self._mode, regime.trained_dtype, self._device)
            self._empty_kept()
            self._trained_dtype = regime.trained_dtype
        shortened = [min(run, KEPT) for run in self._runs]
        if whole or not self._can_shorten or shortened == self._runs:
            return self._count(self._runs, batch, loss, regime)
        total = base = self._count(shortened, batch, loss, regime)
        for index, (run, kept) in enumerate(zip(self._runs, shortened, strict=True)):
            if run == kept:
                continue
            longer = [*shortened[:index], kept + 1, *shortened[index + 1 :]]
            each = self._count(longer, batch, loss, regime).plus(base, -1)
            total = total.plus(each, run - kept)
        return total

    def _empty_kept(self) -> None:
        """Replace weights that stay dequantised by ones without values as well."""
        for linear in self._model.modules():
            if isinstance(linear, QuantizedLinear) and linear.floats is not None:
                shape, dtype = linear.floats.shape, linear.floats.dtype
                with self._mode:
                    linear.floats = torch.empty(shape, dtype=dtype, device=self._device)

    @property
    def _can_shorten(self) -> bool:
        # A prefix is that of every block, and refuses a block that does not read it.
        by_block = isinstance(self._model, PrefixTokens)
        return len(self._lists) == 1 and len(self._runs) <= MOST_RUNS and not by_block

    def _count(self, runs: Sequence[int], batch: Batch, loss: Loss, regime: Regime) -> Passes:
        with _shortened(self._lists, self._runs, runs):
            blocks = blocks_of(self._model, self._spec)
            _unwrap(blocks)
            offloader = wrap_blocks(
                self._model,
                self._spec,
                recompute=regime.recompute,
                compile_blocks=False,
                offload=regime.offload,
            )
            setting = Setting(self._mode, self._device, regime.autocast, self._vocabulary)
            return count_passes(
                self._model,
                batch,
                loss,
                setting,
                besides=kept_weights(self._model),
                last_block=blocks[-1] if blocks else None,
                offloaded=lambda: 0 if offloader is None else offloader.host_bytes,
            )


def empty_model(
    model: nn.Module, mode: FakeTensorMode, trained_dtype: torch.dtype, device: torch.device
) -> None:
    """Replace parameters and buffers by ones without values, in place; shared ones stay so."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                dtype = trained_dtype if parameter.requires_grad else parameter.dtype
                with mode:
                    empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            module._parameters[leaf] = made[id(parameter)]
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                with mode:
                    empty = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
                module._buffers[leaf] = empty


def kept_weights(model: nn.Module) -> list[torch.Tensor]:
    """Weights that stay dequantised beside their bytes."""
    linears = (module for module in model.modules() if isinstance(module, QuantizedLinear))
    return [linear.floats for linear in linears if linear.floats is not None]


def _shape(batch: Batch) -> tuple[object, ...]:
    """All of a batch that passes depend on: of documents their number and their squares' sum."""
    masked = batch.attention_mask is not None
    documents = (batch.num_documents, int(batch.position_ids.sum()))
    return (tuple(batch.input_ids.shape), masked, batch.num_targets, *documents)


def _lists_of(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.ModuleList]:
    """What holds the blocks; nothing where something else than lists does."""
    wanted = {id(block) for block in blocks}
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and any(id(one) in wanted for one in module)
    ]
    held = [id(one) for module in lists for one in module]
    return lists if held == [id(block) for block in blocks] else []


def _runs_of(model: nn.Module, blocks: Sequence[nn.Module]) -> list[int]:
    """Lengths of the runs of equal blocks, in order."""
    kinds = _layer_types(model, len(blocks))
    if len(set(kinds)) > 1:
        # A forward looks its kind up by its place, which is another once blocks are left out.
        return [1] * len(blocks)
    return [len(list(run)) for _, run in groupby(map(_signature, blocks))]


def _layer_types(model: nn.Module, num_blocks: int) -> Sequence[str]:
    assert isinstance(model, PreTrainedModel)
    text: dict[str, Any] = model.config.get_text_config().to_dict()
    kinds: Sequence[str] | None = text.get("layer_types")
    return kinds if kinds and len(kinds) == num_blocks else [""] * num_blocks


def _signature(block: nn.Module) -> tuple[object, ...]:
    """Equal for blocks that compute alike on other values."""
    modules = tuple((name, type(one), one.extra_repr()) for name, one in block.named_modules())
    tensors = tuple(
        (name, tuple(one.shape), one.dtype, one.requires_grad)
        for name, one in (*block.named_parameters(), *block.named_buffers())
    )
    kept = tuple(
        name
        for name, one in block.named_modules()
        if isinstance(one, QuantizedLinear) and one.floats is not None
    )
    return (modules, tensors, kept)


@contextmanager
def _shortened(
    lists: Sequence[nn.ModuleList], runs: Sequence[int], kept: Sequence[int]
) -> Iterator[None]:
    """Leave blocks out of the only list of them while inside: of each run the last ones."""
    if list(runs) == list(kept):
        yield
        return
    (blocks,) = lists
    before = blocks._modules
    chosen: list[nn.Module] = []
    every, start = list(blocks), 0
    for run, keep in zip(runs, kept, strict=True):
        chosen += every[start : start + keep]
        start += run
    blocks._modules = {str(index): block for index, block in enumerate(chosen)}
    try:
        yield
    finally:
        blocks._modules = before


def _unwrap(blocks: Sequence[nn.Module]) -> None:
    """Take back what another recomputation has left on blocks."""
    for block in blocks:
        if isinstance(block, GradientCheckpointingLayer):
            block.gradient_checkpointing = False


def _vocabulary(model: nn.Module) -> int:
    assert isinstance(model, PreTrainedModel)
    return int(model.config.get_text_config().vocab_size)
