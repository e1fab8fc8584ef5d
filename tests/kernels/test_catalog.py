"""Claims about every op of the catalog; a new op is tested by existing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dtune_kernels.catalog import CATALOG, LLAMA_8B, SMALL, Op
from dtune_kernels.launch import recorded
from dtune_kernels.library import mutated
from torch.utils._pytree import tree_leaves

from tests.kernels.compare import triton_on_cpu

OPS = list(CATALOG.values())
CPU, META = torch.device("cpu"), torch.device("meta")
each_op = pytest.mark.parametrize("op", OPS, ids=list(CATALOG))


@each_op
def test_schema_and_fake_agree_with_the_implementation(op: Op) -> None:
    torch.manual_seed(0)
    arguments = op.arguments(SMALL, torch.float32, CPU)
    found = torch.library.opcheck(op.call, arguments, raise_exception=True)
    assert set(found.values()) == {"SUCCESS"}


@each_op
def test_cost_is_counted_without_data(op: Op) -> None:
    cost = op.cost(*op.arguments(LLAMA_8B, torch.bfloat16, META))
    assert cost.read > 0
    assert cost.written > 0
    assert cost.flops >= 0


@each_op
def test_triton_returns_what_the_fake_says(op: Op) -> None:
    arguments = op.arguments(LLAMA_8B, torch.bfloat16, META)
    with recorded() as launches:
        launched = op.triton(*arguments)
    assert launches, "no kernel is launched"
    assert _described(launched) == _described(op.call(*arguments))


def _described(result: Any) -> list[tuple[Any, ...]]:
    results = [x for x in tree_leaves(result) if x is not None]
    return [(x.dtype, tuple(x.shape), x.stride()) for x in results]


@pytest.mark.parametrize("op", [op for op in OPS if not mutated(op.call)], ids=lambda op: op.name)
def test_what_a_kernel_does_not_write_shows(op: Op) -> None:
    """Where no kernel runs, the floating results that are left to it are NaN."""
    torch.manual_seed(0)
    with triton_on_cpu(), recorded():
        result = op.call(*op.arguments(SMALL, torch.float32, CPU))
    floating = [x for x in tree_leaves(result) if x is not None and x.is_floating_point()]
    assert not floating or any(x.isnan().all() for x in floating)
