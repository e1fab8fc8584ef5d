"""What happens to the blocks of a model before it is spread: the one place that knows the order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from dtune.errors import ConfigError
from dtune.parallel.offload import Hooks, Offload
from dtune.parallel.selective import keep_on_device, keep_packed
from dtune.runtime.schema import Recompute
from dtune.types import ModelSpec


def _at_once(forward: Callable[..., Any], *args: Any) -> Any:
    return forward(*args)


_FUNCTIONS: dict[Recompute, Callable[..., Any]] = {
    Recompute.none: _at_once,
    Recompute.selective: partial(checkpoint, use_reentrant=False, context_fn=keep_on_device),
    Recompute.full: partial(checkpoint, use_reentrant=False),
}
"""What calls the forward of a block while it trains."""


def _beside(
    function: Callable[..., Any], forward: Callable[..., Any], *args: Any, hooks: Hooks
) -> Any:
    return function(forward, *args)


def _keeping(forward: Callable[..., Any], *args: Any, hooks: Hooks) -> Any:
    contexts = partial(keep_packed, *hooks)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts)


def blocks_of(model: nn.Module, spec: ModelSpec) -> list[nn.Module]:
    """The repeated blocks of a model, in order."""
    return [module for module in model.modules() if isinstance(module, spec.block_types)]


def wrap_blocks(
    model: nn.Module,
    spec: ModelSpec,
    *,
    recompute: Recompute,
    compile_blocks: bool,
    offload: bool = False,
) -> Offload | None:
    """Recompute, offload, then compile, in place and keeping names; the caller shards afterwards.

    One compiled block serves all that are alike; it is computed again as a whole. What a block
    that is computed again keeps (its input, with ``selective`` its products) is offloaded.
    Returns what offloads, if anything does.
    """
    if offload and compile_blocks:
        raise ConfigError(
            "train.offload_activations=true cannot run with train.compile=true: what a compiled "
            "block saves is decided inside of it; set train.compile=false"
        )
    blocks = blocks_of(model, spec)
    offloader = Offload(len(blocks)) if offload else None
    for index, block in enumerate(blocks):
        function = _FUNCTIONS[recompute]
        if offloader is not None:
            inner = _keeping if recompute is Recompute.selective else partial(_beside, function)
            function = partial(offloader.run, index, inner)
        if recompute is not Recompute.none or offload:
            _recompute(block, function, recompute=recompute)
    if compile_blocks:
        for block in blocks:
            block.compile()
    return offloader


def _recompute(block: nn.Module, function: Callable[..., Any], *, recompute: Recompute) -> None:
    """Make a block of transformers run its forward through ``function`` while it trains.

    Not by ``gradient_checkpointing_enable``: that also makes the embedding's output require a
    gradient, which this kind of recomputation has no need for.
    """
    if not isinstance(block, GradientCheckpointingLayer):
        raise ConfigError(
            f"train.recompute={recompute.value}: {type(block).__name__} can neither recompute nor "
            "offload its activations; set train.recompute=none train.offload_activations=false"
        )
    own: Any = block  # attributes of transformers' class, which nn.Module types as modules
    own.gradient_checkpointing = True
    own._gradient_checkpointing_func = function
