"""Cross entropy of a linear head: no sync, never all logits, nothing silent, compiled whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from dtune_kernels.catalog import CATALOG
from dtune_kernels.cross_entropy import linear_cross_entropy
from dtune_kernels.cross_entropy.autograd import default_chunk_rows
from dtune_kernels.cross_entropy.ops import linear_cross_entropy_cost
from dtune_kernels.errors import KernelArgumentError
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.compare import triton_on_cpu
from tests.kernels.test_cross_entropy import (
    EVERYTHING,
    both_backends,
    both_reductions,
    on,
    ours,
    plain,
    problem,
    targets,
    with_grads,
)


class _Made(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")
        if name.startswith("dtune::"):
            # As on a GPU: the reference's own temporaries are not counted.
            out = CATALOG[name.removeprefix("dtune::")].reference(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.seen.append((name, tuple(x.shape)))
        return out


@contextmanager
def made() -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Names and shapes of what is computed; what would wait for the device raises."""
    mode = _Made()
    with mode:
        yield mode.seen


@both_backends
def test_a_label_outside_the_vocabulary_is_not_silent(backend: str) -> None:
    inputs, labels = problem(5, 8, 40, torch.float32)
    for wrong in (40, -1):
        labels[2] = wrong
        with on(backend):
            losses = ours(*inputs, labels, reduction="none")
        assert losses.isnan().tolist() == [False, False, True, False, False]


@both_reductions
def test_more_targets_than_announced_are_not_silent(reduction: str) -> None:
    inputs, labels = problem(5, 8, 40, torch.float32)
    labels = labels.clamp(min=0)
    loss, *grads = with_grads(
        ours, inputs, labels, torch.float32, torch.tensor(1.0), num_targets=4, reduction=reduction
    )
    assert loss.isnan().all()
    assert all(grad.isnan().any() for grad in grads)


@both_reductions
def test_only_gradients_that_are_wanted_are_computed(reduction: str) -> None:
    (hidden, weight, bias), labels = problem(6, 16, 33, torch.float32)
    for trained in (hidden, weight, bias):
        assert trained is not None
        trained.requires_grad_()
        with made() as frozen:
            ours(hidden, weight, bias, labels, reduction=reduction).sum().backward()
        wide = [shape for _, shape in frozen if shape == (33, 16)]
        assert bool(wide) == (trained is weight)
        assert trained.grad is not None
        trained.requires_grad_(False)
    with torch.no_grad(), made() as ran:
        ours(hidden.requires_grad_(), weight, bias, labels, reduction=reduction)
    assert (6, 16) not in [shape for name, shape in ran if "mm" in name]


@both_reductions
def test_the_graph_can_be_kept(reduction: str) -> None:
    inputs, labels = problem(6, 16, 33, torch.float32)
    hidden = inputs[0].requires_grad_()
    loss = ours(*inputs, labels, reduction=reduction).sum()
    (first,) = torch.autograd.grad(3 * loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, hidden)
    assert torch.equal(first, second)


def test_the_scale_of_a_half_precision_gradient_is_not_rounded_first() -> None:
    inputs, labels = problem(64, 16, 33, torch.bfloat16)
    hidden = inputs[0].requires_grad_()
    scale = torch.tensor(1 / 3)
    (unit,) = torch.autograd.grad(ours(*inputs, labels), hidden)
    (third,) = torch.autograd.grad(ours(*inputs, labels) * scale, hidden)
    assert torch.equal(third, (unit.float() * scale).to(torch.bfloat16))


@pytest.mark.parametrize("counted", [False, True])
@both_reductions
def test_no_sync_and_never_all_logits(reduction: str, counted: bool) -> None:
    rows, vocab, chunk = 40, 129, 8
    inputs, labels = problem(rows, 4, vocab, torch.float32)
    count = targets(labels) if counted else None
    with made() as seen:
        with_grads(
            ours,
            inputs,
            labels,
            torch.float32,
            torch.tensor(0.5),
            chunk_rows=chunk,
            num_targets=count,
            reduction=reduction,
            **EVERYTHING,
        )
    largest = max(torch.Size(shape).numel() for _, shape in seen)
    padded = 160
    assert chunk * vocab <= largest <= chunk * padded
    computed = [shape for name, shape in seen if name == "dtune::cross_entropy_chunk_"]
    # Losses and lse of each chunk.
    assert sum(shape[0] for shape in computed) == 2 * (count if counted else rows)


def test_the_measure_of_what_is_made_sees_all_logits_and_syncs() -> None:
    inputs, labels = problem(40, 4, 129, torch.float32)
    with made() as seen:
        plain(*inputs, labels)
    assert (40, 129) in [shape for _, shape in seen]
    with pytest.raises(AssertionError), made():
        torch.ones(()).item()


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["bare", "all"])
@both_reductions
def test_compiles_in_one_graph(reduction: str, options: dict[str, float], counted: bool) -> None:
    inputs, labels = problem(12, 16, 33, torch.float32)
    settings = dict(options, reduction=reduction, chunk_rows=5)
    if counted:
        settings["num_targets"] = targets(labels)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    upstream = torch.tensor(0.3)
    got = with_grads(compiled, inputs, labels, torch.float32, upstream, **settings)
    wanted = with_grads(ours, inputs, labels, torch.float32, upstream, **settings)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("features", "weight_grad", "rows"),
    [
        (8192, False, 1024),
        (4096, False, 1024),
        (3072, False, 2048),
        (2048, False, 2048),
        (64, False, 4096),
        (4096, True, 4096),
    ],
)
def test_rows_of_a_chunk(features: int, weight_grad: bool, rows: int) -> None:
    assert default_chunk_rows(features, weight_grad=weight_grad) == rows


def test_a_frozen_head_costs_two_gemms_and_a_trained_one_three() -> None:
    hidden = torch.empty(16, 4096, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(1000, 4096, dtype=torch.bfloat16, device="meta")
    frozen = linear_cross_entropy_cost(hidden, weight, 16, weight_grad=False)
    trained = linear_cross_entropy_cost(hidden, weight, 16, weight_grad=True)
    assert trained.flops - frozen.flops == 2 * 16 * 1000 * 4096
    assert trained.written - frozen.written == 2 * 1000 * 4096


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.zeros(9, 5)}, r"shape of weight is \[9, 5\], wanted \[any, 4\]"),
        ({"weight": torch.zeros(0, 4)}, r"shape of weight is \[0, 4\], wanted V > 0"),
        ({"weight": torch.zeros(9, 4).half()}, "dtype of weight is torch.float16"),
        ({"hidden": torch.zeros(3, 4).long()}, "dtype of hidden is torch.int64"),
        ({"labels": torch.zeros(4).long()}, r"shape of labels is \[4\], wanted \[3\]"),
        ({"labels": torch.zeros(3).int()}, "dtype of labels is torch.int32"),
        ({"labels": torch.zeros(3, device="meta").long()}, "device of labels is meta"),
        ({"bias": torch.zeros(8)}, r"shape of bias is \[8\], wanted \[9\]"),
        ({"num_targets": 4}, "num_targets is 4, wanted 0 to 3, the rows"),
        ({"num_targets": -1}, "num_targets is -1"),
        ({"chunk_rows": 0}, "chunk_rows is 0, wanted at least 1"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5, wanted 0 to 1"),
        ({"z_loss": -1.0}, "z_loss is -1.0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"reduction": "mean"}, "reduction is mean, wanted sum or none"),
    ],
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(9, 4),
        "labels": torch.zeros(3).long(),
    }
    with pytest.raises(KernelArgumentError, match="linear_cross_entropy: " + message):
        linear_cross_entropy(**(arguments | changed))


def test_triton_refuses_fp64() -> None:
    inputs, labels = problem(3, 4, 9, torch.float64)
    with (
        triton_on_cpu(),
        pytest.raises(KernelArgumentError, match=r"dtype of logits is torch\.float64"),
    ):
        ours(*inputs, labels)
