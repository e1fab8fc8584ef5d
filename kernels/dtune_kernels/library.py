"""How an op is made: schema, reference, Triton kernel, fake and cost in one entry."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

_LIBRARY = torch.library.Library("dtune", "DEF")

CATALOG: dict[str, Op] = {}
"""Every op by name, in the order of definition; complete once ``dtune_kernels.catalog`` is in."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a transformer layer, from which the arguments of every op follow."""

    name: str
    tokens: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rank: int = 16


@dataclass(frozen=True)
class Cost:
    """What a call must do at least: each argument read once, each result written once."""

    flops: int
    read: int
    """Bytes."""
    written: int
    """Bytes."""
    saved: int = 0
    """Bytes that the op's autograd function keeps for its backward, beyond parameters."""


Arguments = Callable[[Shape, torch.dtype, torch.device], tuple[Any, ...]]


@dataclass(frozen=True)
class Op:
    """One op ``dtune::name``: a catalog entry."""

    name: str
    call: OpOverload
    reference: Callable[..., Any]
    """Plain PyTorch, exact to the rounding of its result; runs in fp64 too. The CPU's kernel."""
    plain: Callable[..., Any]
    """What a model without the op runs, with its rounding: the measure of error and of speed."""
    triton: Callable[..., Any]
    """Launches the Triton kernel; imports it on the first call."""
    cost: Callable[..., Cost]
    """Cost of a call, from the call's arguments (meta tensors will do)."""
    arguments: Arguments
    """Arguments of a call for a layer's sizes."""
    source: str
    """Paper and equation, or the code whose results it equals."""


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    triton: str,
    fake: Callable[..., Any],
    cost: Callable[..., Cost],
    arguments: Arguments,
    source: str,
    plain: Callable[..., Any] | None = None,
) -> OpOverload:
    """Register an op with its implementations and enter it into the catalog.

    Args:
        schema: As ``torch.library`` reads it, with the op's name, without namespace.
        reference: The implementation on the CPU.
        triton: ``module:function`` of the launcher, the implementation on a GPU.
        fake: Empty results from meta tensors.
        cost: See ``Op``.
        arguments: See ``Op``.
        source: See ``Op``.
        plain: See ``Op``; the reference where a plain model runs just that.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"dtune::{name}", fake, lib=_LIBRARY)
    call: OpOverload = getattr(torch.ops.dtune, name).default
    _LIBRARY.impl(name, _versioned(reference, call), "CPU")
    launcher = _versioned(_lazy(triton), call)
    _LIBRARY.impl(name, launcher, "CUDA")
    CATALOG[name] = Op(name, call, reference, plain or reference, launcher, cost, arguments, source)
    return call


def mutated(call: OpOverload) -> list[int]:
    """Positions of the arguments that an op writes to."""
    return [
        position
        for position, argument in enumerate(call._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


def _versioned(function: Callable[..., Any], call: OpOverload) -> Callable[..., Any]:
    """Tell autograd of what an implementation writes, as PyTorch's own in-place ops do."""
    positions = mutated(call)
    if not positions:
        return function

    def run(*args: Any) -> Any:
        result = function(*args)
        for position in positions:
            if args[position] is not None:
                torch.autograd.graph.increment_version(args[position])
        return result

    return run


def _lazy(path: str) -> Callable[..., Any]:
    module, _, function = path.partition(":")

    @functools.cache
    def load() -> Callable[..., Any]:
        loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return loaded

    def launch(*args: Any, **kwargs: Any) -> Any:
        return load()(*args, **kwargs)

    return launch


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Call a differentiable function without autocast, since its operands have their dtypes."""
    device = next(x.device.type for x in args if isinstance(x, torch.Tensor))
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return function.apply(*args)
    with torch.autocast(device, enabled=False):
        return function.apply(*args)


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes that the tensors hold together."""
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)
