"""RMSNorm: exact, by reference and by Triton, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from dtune_kernels.errors import KernelArgumentError
from dtune_kernels.rms_norm import add_rms_norm, rms_norm

from tests.kernels.compare import assert_parity, triton_on_cpu

SHAPES = [(1, 24), (7, 24), (5, 100), (33, 128), (2, 3, 40), (0, 24)]
EPS = 1e-6


def plain(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, *, gemma: bool
) -> torch.Tensor:
    h = x if residual is None else x + residual
    wide = h.to(torch.promote_types(h.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if gemma:
        return (normed * (1 + weight.to(wide.dtype))).to(h.dtype)
    return weight * normed.to(h.dtype)


def ours(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, *, gemma: bool
) -> torch.Tensor:
    if residual is None:
        return rms_norm(x, weight, eps=EPS, gemma=gemma)
    y, h = add_rms_norm(x, residual, weight, eps=EPS, gemma=gemma)
    assert torch.equal(h, x + residual)
    return y


def with_grads(function, inputs, dtype, upstream, **options):  # type: ignore[no-untyped-def]
    leaves = [None if x is None else x.detach().clone().to(dtype).requires_grad_() for x in inputs]
    y = function(*leaves, **options)
    y.backward(upstream.to(y.dtype).expand(y.shape))
    return [y.detach(), *(x.grad for x in leaves if x is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gemma", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_value_and_gradients_are_as_near_as_plain(
    shape: tuple[int, ...], added: bool, gemma: bool, dtype: torch.dtype, backend: str
) -> None:
    torch.manual_seed(0)
    x, residual, dy = (torch.randn(shape).to(dtype) for _ in range(3))
    weight = (1 + torch.randn(shape[-1]) / 4).to(dtype)
    inputs = (x, weight, residual if added else None)
    exact = with_grads(plain, inputs, torch.float64, dy, gemma=gemma)
    theirs = with_grads(plain, inputs, dtype, dy, gemma=gemma)
    if backend == "triton":
        with triton_on_cpu():
            mine = with_grads(ours, inputs, dtype, dy, gemma=gemma)
    else:
        mine = with_grads(ours, inputs, dtype, dy, gemma=gemma)
    for got, wanted, other in zip(mine, exact, theirs, strict=True):
        assert_parity(got, wanted, other)


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded upstream"])
def test_any_strides(layout: str) -> None:
    x, dy = torch.randn(6, 24), torch.randn(6, 24)
    weight = torch.rand(24)
    if layout == "strided":
        x = torch.randn(6, 48)[:, :24]
    if layout == "transposed":
        x = torch.randn(24, 6).t()
    if layout == "expanded upstream":
        dy = torch.randn(1, 24)
    inputs = (x, weight, None)
    exact = with_grads(plain, inputs, torch.float64, dy, gemma=False)
    theirs = with_grads(plain, inputs, torch.float32, dy, gemma=False)
    with triton_on_cpu():
        mine = with_grads(ours, inputs, torch.float32, dy, gemma=False)
    for got, wanted, other in zip(mine, exact, theirs, strict=True):
        assert_parity(got, wanted, other)


@pytest.mark.parametrize("gemma", [False, True])
def test_gradcheck(gemma: bool) -> None:
    x, residual = (torch.randn(5, 6, dtype=torch.double, requires_grad=True) for _ in range(2))
    weight = torch.randn(6, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *a: rms_norm(*a, eps=EPS, gemma=gemma), (x, weight))
    assert torch.autograd.gradcheck(
        lambda *a: add_rms_norm(*a, eps=EPS, gemma=gemma), (x, residual, weight)
    )


def test_a_frozen_weight_gets_no_gradient() -> None:
    x = torch.randn(5, 6, requires_grad=True)
    weight = torch.randn(6)
    rms_norm(x, weight, eps=EPS).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(KernelArgumentError, match=r"rms_norm: shape of weight is \[5\], wanted"):
        rms_norm(torch.zeros(2, 6), torch.zeros(5), eps=EPS)
    with pytest.raises(KernelArgumentError, match=r"rms_norm: dtype of x is torch.int64"):
        rms_norm(torch.zeros(2, 6, dtype=torch.int64), torch.zeros(6), eps=EPS)
    with pytest.raises(KernelArgumentError, match=r"add_rms_norm: shape of residual is \[1, 6\]"):
        add_rms_norm(torch.zeros(2, 6), torch.zeros(1, 6), torch.zeros(6), eps=EPS)


def test_triton_refuses_what_it_cannot_compute_as_exactly() -> None:
    x = torch.ones(2, 8, dtype=torch.float64)
    with triton_on_cpu(), pytest.raises(KernelArgumentError, match="rms_norm: dtype of x"):
        rms_norm(x, torch.ones(8, dtype=torch.float64), eps=EPS)
    wide = torch.ones(1, 32769)
    with triton_on_cpu(), pytest.raises(KernelArgumentError, match="at most 32768"):
        add_rms_norm(wide, wide, torch.ones(32769), eps=EPS)
