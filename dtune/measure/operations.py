"""What one operation computes and moves, from the shapes of its arguments and results."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
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

# What torch's registry of FLOPs leaves out.
_IN_PLACE = {_aten.addmm_: _aten.addmm, _aten.baddbmm_: _aten.baddbmm}

# Of documents that lie one behind another, by the schema's name: products as above.
_PACKED = {
    "torch_attn::_varlen_attn": 2,
    "torch_attn::_varlen_attn_backward": 5,
    "flash_attn::_flash_attn_varlen_forward": 2,
    "flash_attn::_flash_attn_varlen_backward": 5,
}

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


Known = Callable[[torch.Tensor], list[int] | None]
"""The integers of a flat tensor without values; None where they are not known."""


def _nothing(tensor: torch.Tensor) -> None:
    """Knows no values."""


def cost_of(
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    results: Any,
    *,
    known: Known = _nothing,
) -> Operation | None:
    """What a call costs on the device; None where it does nothing there: views, allocations.

    ``known`` is asked where documents lie; where it does not say, each is as long as it can be.
    """
    outputs = _tensors(results)
    if func in _BY_CALL:
        return _of_kernel(func, args, kwargs)
    if _is_free(func):
        return None
    packet = _IN_PLACE.get(func.overloadpacket, func.overloadpacket)
    inputs = _tensors((args, kwargs))
    flops, kind = 0, "other"
    if packet in _PRODUCTS:
        flops, kind = _attention(func, args, kwargs), "attention"
    elif func._schema.name in _PACKED:
        flops, kind = _packed_attention(func, args, kwargs, known), "attention"
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


def _given(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by their names."""
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _attention(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """FLOPs of torch's kernels of attention: half of each product where they are causal."""
    given = _given(func, args, kwargs)
    batch, heads, length, width = given["query"].shape
    whole = 2 * _PRODUCTS[func.overloadpacket] * batch * heads * length * given["key"].shape[-2]
    return int(whole * width // (2 if given.get("is_causal") else 1))


def _packed_attention(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], known: Known
) -> int:
    """FLOPs of causal attention over documents: queries [T, H, D], bounds [documents + 1]."""
    given = _given(func, args, kwargs)
    total, heads, width = _first(given, "query", "q").shape
    longest = _first(given, "max_q", "max_seqlen_q")
    bounds = known(_first(given, "cu_seq_q", "cu_seqlens_q"))
    if bounds is None:
        bounds = [*range(0, total, longest), total]
    window = given.get("window_size") or (given.get("window_size_left", -1), 0)
    pairs = sum(_pairs(stop - start, window[0]) for start, stop in pairwise(bounds))
    return int(2 * _PACKED[func._schema.name] * pairs * heads * width)


def _first(given: dict[str, Any], *names: str) -> Any:
    return next(given[name] for name in names if name in given)


def _pairs(length: int, window: int) -> float:
    """Of a document, pairs of a position and one that it sees, itself counted half."""
    seen = length if window < 0 else min(length, window + 1)
    return seen * (length - seen / 2)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    """That an operation touches: of an expanded tensor, what there is of it."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())
