"""What one operation computes and moves, from the shapes of its arguments and results."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from dtune_kernels.catalog import CATALOG
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten

_BY_CALL = {op.call: op for op in CATALOG.values()}

_FORWARD = frozenset(
    {
        _aten._scaled_dot_product_flash_attention_for_cpu,
        _aten._scaled_dot_product_flash_attention,
        _aten._scaled_dot_product_efficient_attention,
        _aten._scaled_dot_product_cudnn_attention,
    }
)
_BACKWARD = frozenset(
    {
        _aten._scaled_dot_product_flash_attention_for_cpu_backward,
        _aten._scaled_dot_product_flash_attention_backward,
        _aten._scaled_dot_product_efficient_attention_backward,
        _aten._scaled_dot_product_cudnn_attention_backward,
    }
)
# Scores and their product with values; and in backward scores once more, and the gradients of
# scores, of queries, of keys and of values.
_PRODUCTS = {**dict.fromkeys(_FORWARD, 2), **dict.fromkeys(_BACKWARD, 5)}

# They read as many bytes as they write, whatever the size of what they pick from.
_PICKS = frozenset(
    {_aten.embedding, _aten.index_select, _aten.gather, _aten.index, _aten.index_put_}
)

# They read nothing of the tensor that they make another one like.
_FILLS = frozenset(
    {
        *(_aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.new_zeros, _aten.new_ones),
        *(_aten.new_full, _aten.zero_, _aten.fill_),
    }
)


class Operation(NamedTuple):
    """One kind of call."""

    kind: str
    """``attention``, ``product`` of matrices, or ``other``."""
    dtype: torch.dtype
    """That it computes in."""
    flops: int
    moved: int
    """Bytes read and written at least."""


def cost_of(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: Any
) -> Operation | None:
    """What a call costs on the device; None where it does nothing there: views, allocations."""
    outputs = _tensors(results)
    if func in _BY_CALL:
        return _of_kernel(func, args, kwargs)
    if _is_free(func):
        return None
    packet = func.overloadpacket
    inputs = _tensors((args, kwargs))
    flops, kind = 0, "other"
    if packet in _PRODUCTS:
        flops, kind = _attention(func, args, kwargs), "attention"
    elif packet in flop_registry:
        flops, kind = int(flop_registry[packet](*args, **kwargs, out_val=results)), "product"
    read = [] if packet in _FILLS else outputs if packet in _PICKS else inputs
    moved = sum(map(_bytes, (*read, *outputs)))
    if not moved:
        return None
    dtype = next((t.dtype for t in (*inputs, *outputs) if t.is_floating_point()), torch.float32)
    return Operation(kind, dtype, flops, moved)


def _of_kernel(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation:
    """One of dtune's own, whose catalog says what it costs."""
    cost = _BY_CALL[func].cost(*args, **kwargs)
    dtype = next((t.dtype for t in _tensors(args) if t.is_floating_point()), torch.float32)
    return Operation("other", dtype, cost.flops, cost.read + cost.written)


def _is_free(func: Any) -> bool:
    if torch.Tag.inplace_view in func.tags:
        return True
    returns = func._schema.returns
    aliases = [r.alias_info for r in returns]
    if returns and all(info is not None and not info.is_write for info in aliases):
        return True
    return func.overloadpacket in _ALLOCATES


_ALLOCATES = frozenset(
    {
        *(_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided),
        *(_aten.new_empty_strided, _aten.detach, _aten.alias, _aten._local_scalar_dense),
        *(_aten.set_, _aten._unsafe_view),
    }
)


def _attention(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """FLOPs of torch's kernels of attention: half of each product where they are causal."""
    names = [argument.name for argument in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    batch, heads, length, width = given["query"].shape
    whole = 2 * _PRODUCTS[func.overloadpacket] * batch * heads * length * given["key"].shape[-2]
    return int(whole * width // (2 if given.get("is_causal") else 1))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    """That an operation touches: of an expanded tensor, what there is of it."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())
