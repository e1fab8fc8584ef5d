"""Cross entropy of a linear head: exact, by reference and by Triton, without ever all logits."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from dtune_kernels.check import errors
from dtune_kernels.cross_entropy import linear_cross_entropy
from torch.nn.functional import cross_entropy, linear

from tests.kernels.compare import assert_parity, triton_on_cpu

EVERYTHING = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0, "logit_scale": 0.7}
OPTIONS = {
    "bare": {},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.5},
    "all": EVERYTHING,
}
both_backends = pytest.mark.parametrize("backend", ["reference", "triton"])
both_reductions = pytest.mark.parametrize("reduction", ["sum", "none"])


def plain(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    reduction: str = "sum",
) -> torch.Tensor:
    logits = linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    logits = logits.reshape(-1, logits.shape[-1])
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    losses = cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    square = torch.logsumexp(logits, -1).square().masked_fill(labels == -100, 0.0)
    losses = losses + z_loss * square
    return losses.sum() if reduction == "sum" else losses


def ours(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    return linear_cross_entropy(hidden, weight, labels, bias=bias, **options)


def with_grads(function, inputs, labels, dtype, upstream, **options):  # type: ignore[no-untyped-def]
    leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    loss = function(*leaves, labels, **options)
    loss.backward(upstream.to(loss.dtype).expand(loss.shape))
    return [loss.detach(), *(x.grad for x in leaves if x is not None)]


def problem(
    rows: int, features: int, vocab: int, dtype: torch.dtype, *, bias: bool = True
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]:
    """Inputs whose logits have a deviation of about 2, rounded to the dtype; labels, half real."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, features).to(dtype)
    weight = (2 * torch.randn(vocab, features) / features**0.5).to(dtype)
    labels = torch.randint(vocab, (rows,))
    labels[torch.rand(rows) < 0.3] = -100
    return (hidden, weight, torch.randn(vocab).to(dtype) if bias else None), labels


def targets(labels: torch.Tensor) -> int:
    return int((labels != -100).sum())


def on(backend: str):  # type: ignore[no-untyped-def]
    return triton_on_cpu() if backend == "triton" else nullcontext()


def assert_near(got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
    """Parity; in fp32, where plain errs by one rounding or by four as it happens, with four."""
    if got.dtype == torch.float32 and exact.any():
        four = (exact * (1 + 2 * torch.finfo(torch.float32).eps)).float()
        plain = max(plain, four, key=lambda x: errors(x, exact)[1])
    assert_parity(got, exact, plain)


def assert_as_plain(  # type: ignore[no-untyped-def]
    inputs, labels, upstream, backend, *, chunk_rows=None, num_targets=None, **options
) -> None:
    dtype = inputs[0].dtype
    exact = with_grads(plain, inputs, labels, torch.float64, upstream, **options)
    theirs = with_grads(plain, inputs, labels, dtype, upstream, **options)
    options |= {"chunk_rows": chunk_rows, "num_targets": num_targets}
    with on(backend):
        mine = with_grads(ours, inputs, labels, dtype, upstream, **options)
    for got, wanted, other in zip(mine, exact, theirs, strict=True):
        assert_near(got, wanted, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("counted", [False, True])
@both_reductions
@both_backends
def test_losses_and_gradients_are_as_near_as_plain(
    backend: str, reduction: str, counted: bool, options: dict[str, float], dtype: torch.dtype
) -> None:
    inputs, labels = problem(23, 24, 131, dtype)
    upstream = torch.randn(23) if reduction == "none" else torch.tensor(0.37)
    assert_as_plain(
        inputs,
        labels,
        upstream,
        backend,
        chunk_rows=5,
        num_targets=targets(labels) if counted else None,
        reduction=reduction,
        **options,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["bare", "all"])
@pytest.mark.parametrize("vocab", [3, 16, 8192, 16531])
def test_rows_of_several_tiles(vocab: int, options: dict[str, float], dtype: torch.dtype) -> None:
    inputs, labels = problem(4, 8, vocab, dtype, bias=False)
    labels = torch.tensor([0, vocab - 1, -100, vocab // 2])
    assert_as_plain(inputs, labels, torch.tensor(1.0), "triton", **options)
    assert_as_plain(inputs, labels, torch.rand(4), "triton", reduction="none", **options)


def test_a_vocabulary_as_large_and_odd_as_models_have() -> None:
    inputs, labels = problem(3, 2, 128257, torch.float32, bias=False)
    labels[-1] = 128256
    assert_as_plain(inputs, labels, torch.tensor(2.0), "reference", chunk_rows=2)


@pytest.mark.parametrize("chunk_rows", [1, 4, 7, 8, 100])
@both_reductions
@both_backends
def test_chunks_need_not_divide_the_rows(backend: str, reduction: str, chunk_rows: int) -> None:
    inputs, labels = problem(8, 16, 33, torch.float32)
    upstream = torch.randn(8) if reduction == "none" else torch.tensor(-1.5)
    assert_as_plain(inputs, labels, upstream, backend, chunk_rows=chunk_rows, reduction=reduction)


@pytest.mark.parametrize("where", ["start", "end", "one left", "none ignored"])
@pytest.mark.parametrize("spare", [None, 0, 1])
@both_reductions
@both_backends
def test_ignored_rows_wherever_they_are(
    backend: str, reduction: str, spare: int | None, where: str
) -> None:
    inputs, labels = problem(9, 16, 33, torch.float32)
    labels = labels.clamp(min=0)
    ignored = {"start": slice(0, 4), "end": slice(5, 9), "one left": slice(1, 9)}
    if where in ignored:
        labels[ignored[where]] = -100
    count = None if spare is None else min(targets(labels) + spare, 9)
    upstream = torch.randn(9) if reduction == "none" else torch.tensor(0.5)
    assert_as_plain(
        inputs, labels, upstream, backend, num_targets=count, chunk_rows=3, reduction=reduction
    )


@pytest.mark.parametrize("rows", [0, 1, 6])
@pytest.mark.parametrize("counted", [False, True])
@both_reductions
@both_backends
def test_without_a_target_the_loss_is_zero_and_so_is_every_gradient(
    backend: str, reduction: str, counted: bool, rows: int
) -> None:
    inputs, labels = problem(rows, 16, 33, torch.float32)
    labels[:] = -100
    with on(backend):
        loss, *grads = with_grads(
            ours,
            inputs,
            labels,
            torch.float32,
            torch.tensor(3.0),
            num_targets=0 if counted else None,
            reduction=reduction,
            **EVERYTHING,
        )
    assert loss.shape == ((rows,) if reduction == "none" else ())
    assert not loss.any()
    for grad, x in zip(grads, inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("layout", ["3-D", "strided", "transposed", "expanded upstream", "1 row"])
@both_backends
def test_any_layout(backend: str, layout: str) -> None:
    (hidden, weight, bias), labels = problem(6, 16, 33, torch.float32)
    upstream = torch.randn(6)
    if layout == "3-D":
        hidden = hidden.view(2, 3, 16)
    if layout == "strided":
        hidden, weight = torch.randn(6, 32)[:, ::2], torch.randn(33, 32)[:, :16] / 4
        labels = torch.stack([labels, labels], 1)[:, 0]
    if layout == "transposed":
        hidden, weight = torch.randn(16, 6).t(), torch.randn(16, 33).t() / 4
    if layout == "expanded upstream":
        upstream = torch.tensor(0.7)
    if layout == "1 row":
        hidden, labels, upstream = hidden[:1], labels.new_tensor([32]), upstream[:1]
    inputs = (hidden, weight, bias)
    assert_as_plain(inputs, labels, upstream, backend, reduction="none")
    assert_as_plain(inputs, labels, torch.tensor(0.7), backend)


@both_reductions
@pytest.mark.parametrize("counted", [False, True])
def test_gradcheck(counted: bool, reduction: str) -> None:
    inputs, labels = problem(7, 4, 9, torch.float64)
    leaves = [x.requires_grad_() for x in inputs if x is not None]
    count = targets(labels) if counted else None

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ours(
            hidden,
            weight,
            bias,
            labels,
            chunk_rows=3,
            num_targets=count,
            reduction=reduction,
            **EVERYTHING,
        )

    assert torch.autograd.gradcheck(loss, leaves)


@both_backends
def test_masked_logits_of_minus_infinity_have_no_share(backend: str) -> None:
    (hidden, weight, bias), labels = problem(5, 8, 40, torch.float32)
    assert bias is not None
    bias[:32] = -torch.inf
    labels[:] = 35
    assert_as_plain((hidden, weight, bias), labels, torch.tensor(1.0), backend)


@both_reductions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_as_a_linear_would(dtype: torch.dtype, reduction: str) -> None:
    inputs, labels = problem(12, 16, 33, torch.float32)
    upstream = torch.rand(12) if reduction == "none" else torch.tensor(0.5)
    exact = with_grads(plain, inputs, labels, torch.float64, upstream, reduction=reduction)
    with torch.autocast("cpu", dtype):
        theirs = with_grads(plain, inputs, labels, torch.float32, upstream, reduction=reduction)
        mine = with_grads(ours, inputs, labels, torch.float32, upstream, reduction=reduction)
    for got, wanted, other in zip(mine, exact, theirs, strict=True):
        assert got.dtype == torch.float32
        # The error is that of autocast: fp32 operands are rounded.
        assert_near(got, wanted, other)
    hidden = inputs[0].to(dtype)
    with torch.autocast("cpu", dtype):
        assert ours(hidden, *inputs[1:], labels).dtype == torch.float32


def test_a_trained_head_sums_its_gradient_in_fp32() -> None:
    """4096 chunks of one row: a sum kept in bf16 would lose those after about 256."""
    torch.manual_seed(0)
    hidden = torch.ones(2048, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(2048, dtype=torch.int64)
    linear_cross_entropy(hidden, weight, labels, chunk_rows=1).backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[-1024.0], [1024.0]]
