"""Which results a block keeps that is otherwise computed again in backward."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_aten = torch.ops.aten
_ATTENTION = frozenset(
    {
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)
# Of documents that lie one behind another, by name: torch makes an op known when its module is
# imported, flash-attn where it is installed.
_PACKED = frozenset({"torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward"})
# Where the left factor of a product is among its arguments.
_PRODUCTS = {_aten.mm.default: 0, _aten.bmm.default: 0, _aten.addmm.default: 1}

DEAR = 256
"""A product that adds up fewer terms costs less than it takes to keep: that with LoRA's B."""

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""What ``torch.utils.checkpoint`` calls for the contexts of forward and of recomputation."""


def is_dear(op: Any, args: tuple[Any, ...]) -> bool:
    """Whether a result is dear to compute again and cheap to keep: attention and large products."""
    if op in _PRODUCTS:
        return bool(args[_PRODUCTS[op]].shape[-1] >= DEAR)
    return op in _ATTENTION or (isinstance(op, OpOverload) and op._schema.name in _PACKED)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_dear(op, args) else CheckpointPolicy.PREFER_RECOMPUTE


keep_on_device: Contexts = partial(create_selective_checkpoint_contexts, _policy)


def keep_packed(
    pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor]
) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The same with a say in where results are kept, as ``saved_tensors_hooks`` has it."""
    kept: dict[Any, deque[Any]] = defaultdict(deque)
    return _Keep(kept, pack), _Recall(kept, unpack)


class _Packed:
    """A result's tensor, packed; a class of its own so that it is told from other leaves."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Keep(TorchDispatchMode):
    """The forward pass: dear results are packed, in the order in which an op made them."""

    def __init__(self, kept: dict[Any, deque[Any]], pack: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept, self._pack = kept, pack

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if is_dear(func, args):
            packed = tree_map_only(torch.Tensor, lambda t: _Packed(self._pack(t)), results)
            self._kept[func].append(packed)
        return results


class _Recall(TorchDispatchMode):
    """The recomputation: the same calls in the same order get what was kept."""

    def __init__(self, kept: dict[Any, deque[Any]], unpack: Callable[[Any], torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept, self._unpack = kept, unpack

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not is_dear(func, args):
            return func(*args, **(kwargs or {}))
        packed = self._kept[func].popleft()
        return tree_map_only(_Packed, lambda one: self._unpack(one.value), packed)
