"""What happens to the blocks of a model before it is spread: the one place that knows the order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from dtune.errors import ConfigError
from dtune.runtime.schema import Recompute
from dtune.types import ModelSpec

_aten = torch.ops.aten
# Dear to compute again, cheap to keep beside the elementwise results between them.
_KEPT = frozenset(
    {
        _aten.mm.default,
        _aten.bmm.default,
        _aten.addmm.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


_Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
_selective_contexts: _Contexts = partial(create_selective_checkpoint_contexts, _keep_products)


def blocks_of(model: nn.Module, spec: ModelSpec) -> list[nn.Module]:
    """The repeated blocks of a model, in order."""
    return [module for module in model.modules() if isinstance(module, spec.block_types)]


def wrap_blocks(
    model: nn.Module, spec: ModelSpec, *, recompute: Recompute, compile_blocks: bool
) -> None:
    """Recompute, then compile, in place and keeping names; the caller shards afterwards.

    One compiled block serves all that are alike; it is computed again as a whole.
    """
    if recompute is not Recompute.none:
        function = partial(checkpoint, use_reentrant=False)
        if recompute is Recompute.selective:
            function = partial(checkpoint, use_reentrant=False, context_fn=_selective_contexts)
        for block in blocks_of(model, spec):
            _recompute(block, function, recompute=recompute)
    if compile_blocks:
        for block in blocks_of(model, spec):
            block.compile()


def _recompute(block: nn.Module, function: Callable[..., Any], *, recompute: Recompute) -> None:
    """Make a block of transformers run its forward through ``function`` while it trains.

    Not by ``gradient_checkpointing_enable``: that also makes the embedding's output require a
    gradient, which this kind of recomputation has no need for.
    """
    if not isinstance(block, GradientCheckpointingLayer):
        raise ConfigError(
            f"train.recompute={recompute.value}: {type(block).__name__} cannot recompute its "
            "activations; set train.recompute=none"
        )
    own: Any = block  # attributes of transformers' class, which nn.Module types as modules
    own.gradient_checkpointing = True
    own._gradient_checkpointing_func = function
