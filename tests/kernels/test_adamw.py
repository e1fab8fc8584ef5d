"""AdamW over a flat buffer: the updates of torch.optim.AdamW, by reference and by Triton."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from dtune_kernels.adamw import adamw_flat_
from dtune_kernels.catalog import CATALOG
from dtune_kernels.errors import KernelArgumentError

from tests.kernels.compare import assert_parity, triton_on_cpu

BACKENDS = {"reference": nullcontext, "triton": triton_on_cpu}
STEPS = 20
NUMBERS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}


@dataclass
class Run:
    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


def start(size: int, *, zero: bool = False) -> torch.Tensor:
    return torch.zeros(size) if zero else torch.randn(size)


def gradients(size: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Of sizes from 1e-4 to 1, as parameters of a model have them."""
    scale = 10.0 ** (-4 * torch.rand(size))
    return [(scale * torch.randn(size)).to(dtype) for _ in range(STEPS)]


def rates() -> list[float]:
    return [1e-2 * (at + 1) / STEPS for at in range(STEPS)]


def theirs(
    first: torch.Tensor,
    grads: list[torch.Tensor],
    dtype: torch.dtype,
    *,
    clip: float = 1.0,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> Run:
    parameter = torch.nn.Parameter(first.to(dtype, copy=True))
    optimizer = torch.optim.AdamW(
        [parameter], betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, foreach=False
    )
    for grad, rate in zip(grads, rates(), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = grad.to(dtype) * clip
        optimizer.step()
    state = optimizer.state[parameter]
    return Run(parameter.detach(), state["exp_avg"], state["exp_avg_sq"])


def ours(
    first: torch.Tensor,
    grads: list[torch.Tensor],
    *,
    backend: str,
    clip: float | None = None,
    step_dtype: torch.dtype = torch.float32,
    shadow: torch.Tensor | None = None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> Run:
    run = Run(first.clone(), torch.zeros_like(first), torch.zeros_like(first))
    for at, (grad, rate) in enumerate(zip(grads, rates(), strict=True)):
        with BACKENDS[backend]():
            adamw_flat_(
                run.master,
                grad,
                run.exp_avg,
                run.exp_avg_sq,
                shadow=shadow,
                clip_scale=None if clip is None else torch.tensor(clip),
                lr=torch.tensor(rate),
                step=torch.tensor(at + 1, dtype=step_dtype),
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                weight_decay=weight_decay,
            )
    return run


def assert_run(got: Run, exact: Run, plain: Run) -> None:
    assert_parity(got.master, exact.master, plain.master)
    assert_parity(got.exp_avg, exact.exp_avg, plain.exp_avg)
    assert_parity(got.exp_avg_sq, exact.exp_avg_sq, plain.exp_avg_sq)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("zero", [False, True], ids=["random start", "zero start"])
@pytest.mark.parametrize("size", [1, 17, 2048, 5001])
def test_twenty_steps_equal_torch(size: int, zero: bool, backend: str) -> None:
    torch.manual_seed(0)
    first, grads = start(size, zero=zero), gradients(size)
    exact = theirs(first, grads, torch.float64, **NUMBERS)
    plain = theirs(first, grads, torch.float32, **NUMBERS)
    assert_run(ours(first, grads, backend=backend, **NUMBERS), exact, plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "changed",
    [
        {"weight_decay": 0.0},
        {"beta1": 0.0},
        {"beta2": 0.0},
        {"beta2": 0.9999},
        {"eps": 1e-3},
    ],
    ids=str,
)
def test_other_numbers(changed: dict[str, float], backend: str) -> None:
    torch.manual_seed(0)
    first, grads = start(100), gradients(100)
    numbers = {**NUMBERS, **changed}
    exact = theirs(first, grads, torch.float64, **numbers)
    plain = theirs(first, grads, torch.float32, **numbers)
    assert_run(ours(first, grads, backend=backend, **numbers), exact, plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_gradient_is_scaled_and_kept(dtype: torch.dtype, backend: str) -> None:
    torch.manual_seed(0)
    first, grads = start(100), gradients(100, dtype)
    clip = 0.3
    kept = [grad.clone() for grad in grads]
    exact = theirs(first, grads, torch.float64, clip=clip, **NUMBERS)
    plain = theirs(first, grads, torch.float32, clip=clip, **NUMBERS)
    assert_run(ours(first, grads, clip=clip, backend=backend, **NUMBERS), exact, plain)
    assert all(torch.equal(grad, same) for grad, same in zip(grads, kept, strict=True))


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("reference", torch.bfloat16),
        ("reference", torch.float16),
        ("triton", torch.float16),
    ],
)
def test_the_shadow_is_the_rounded_master(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    first, grads = start(101), gradients(101)
    shadow = torch.full((101,), torch.nan, dtype=dtype)
    run = ours(first, grads, shadow=shadow, backend=backend, **NUMBERS)
    assert torch.equal(shadow, run.master.to(dtype))
    without = ours(first, grads, backend=backend, **NUMBERS)
    assert torch.equal(run.master, without.master)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_step_may_be_an_integer(backend: str) -> None:
    torch.manual_seed(0)
    first, grads = start(30), gradients(30)
    real = ours(first, grads, backend=backend, **NUMBERS)
    whole = ours(first, grads, backend=backend, step_dtype=torch.int64, **NUMBERS)
    assert torch.equal(real.master, whole.master)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranges_of_a_buffer_have_their_own_decay(backend: str) -> None:
    torch.manual_seed(0)
    size, cut = 100, 37
    first, grad = start(size), torch.randn(size)
    master, exp_avg, exp_avg_sq = first.clone(), torch.zeros(size), torch.zeros(size)
    shadow = torch.zeros(size, dtype=torch.float16)
    scalars = {"clip_scale": None, "lr": torch.tensor(1e-2), "step": torch.tensor(1.0)}
    for part, decay in ((slice(cut), 0.5), (slice(cut, size), 0.0)):
        with BACKENDS[backend]():
            adamw_flat_(
                master[part],
                grad[part],
                exp_avg[part],
                exp_avg_sq[part],
                shadow=shadow[part],
                **scalars,
                **{**NUMBERS, "weight_decay": decay},
            )
    parameters = [
        torch.nn.Parameter(first[:cut].double()),
        torch.nn.Parameter(first[cut:].double()),
    ]
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameters[0]], "weight_decay": 0.5},
            {"params": [parameters[1]], "weight_decay": 0.0},
        ],
        lr=1e-2,
        foreach=False,
    )
    parameters[0].grad, parameters[1].grad = grad[:cut].double(), grad[cut:].double()
    optimizer.step()
    exact = torch.cat(parameters).detach()
    assert_parity(master, exact, exact.float())
    assert torch.equal(shadow, master.half())


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_range_changes_nothing(backend: str) -> None:
    """Of a buffer whose other elements a wrong bound would reach."""
    torch.manual_seed(0)
    buffers = [torch.rand(8) for _ in range(3)]
    before = [each.clone() for each in buffers]
    master, exp_avg, exp_avg_sq = (each[4:4] for each in buffers)
    numbers = {"lr": torch.tensor(1e-2), "step": torch.tensor(1), **NUMBERS}
    with BACKENDS[backend]():
        adamw_flat_(
            master, torch.zeros(0), exp_avg, exp_avg_sq, shadow=None, clip_scale=None, **numbers
        )
    assert all(torch.equal(x, y) for x, y in zip(buffers, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_blocked_update_changes_nothing_and_another_is_as_without(backend: str) -> None:
    torch.manual_seed(0)
    states = [torch.randn(33), torch.randn(33), torch.rand(33), torch.zeros(33, dtype=torch.half)]
    grad = torch.randn(33)
    numbers = {"clip_scale": None, "lr": torch.tensor(0.1), "step": torch.tensor(2), **NUMBERS}
    results = []
    for blocked in (None, torch.zeros(()), torch.ones(())):
        master, exp_avg, exp_avg_sq, shadow = own = [x.clone() for x in states]
        with BACKENDS[backend]():
            adamw_flat_(
                master, grad, exp_avg, exp_avg_sq, shadow=shadow, blocked=blocked, **numbers
            )
        results.append(own)
    free, allowed, stopped = results
    assert all(torch.equal(x, y) for x, y in zip(free, allowed, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(stopped, states, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(free, states, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_late_steps_are_corrected_less(backend: str) -> None:
    """From the same state, at step t the change is that of fp64, also where 1 - b^t is 1."""
    torch.manual_seed(0)
    for step in (1, 2, 1000, 10**6):
        master, grad = torch.zeros(50), torch.randn(50)
        exp_avg, exp_avg_sq = torch.randn(50), torch.rand(50)
        m = 0.9 * exp_avg.double() + 0.1 * grad.double()
        v = 0.999 * exp_avg_sq.double() + 0.001 * grad.double() ** 2
        exact = -1e-3 * m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        with BACKENDS[backend]():
            adamw_flat_(
                master,
                grad,
                exp_avg,
                exp_avg_sq,
                shadow=None,
                clip_scale=None,
                lr=torch.tensor(1e-3),
                step=torch.tensor(step),
                **NUMBERS,
            )
        # A product of a few numbers, each rounded, and lr in fp32.
        assert ((master.double() - exact).norm() / exact.norm()) < 4 * torch.finfo(
            torch.float32
        ).eps


def test_the_plain_path_is_torch() -> None:
    torch.manual_seed(0)
    states = [torch.randn(50), torch.randn(50), torch.randn(50), torch.rand(50)]
    numbers = (torch.tensor(0.5), torch.tensor(1e-2), torch.tensor(3.0))
    scalars = (*numbers, None, 0.9, 0.999, 1e-8, 0.1)
    runs = []
    for function in (CATALOG["adamw_flat_"].plain, CATALOG["adamw_flat_"].reference):
        own = [x.clone() for x in states]
        shadow = torch.zeros(50, dtype=torch.bfloat16)
        function(*own, shadow, *scalars)
        runs.append(own)
    for plain, reference in zip(*runs, strict=True):
        torch.testing.assert_close(plain, reference)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_notices_the_update(backend: str) -> None:
    x = torch.randn(4)
    leaf = torch.randn(4, requires_grad=True)
    loss = (leaf * x).sum()
    with BACKENDS[backend]():
        adamw_flat_(
            x,
            torch.randn(4),
            torch.zeros(4),
            torch.zeros(4),
            shadow=None,
            clip_scale=None,
            lr=torch.tensor(0.1),
            step=torch.tensor(1),
            **NUMBERS,
        )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"master": torch.zeros(2, 3)}, r"shape of master is \[2, 3\], wanted \[n\]"),
        ({"grad": torch.zeros(5)}, r"shape of grad is \[5\], wanted \[6\]"),
        ({"grad": torch.zeros(6).double()}, r"dtype of grad is torch.float64"),
        ({"master": torch.zeros(6).half()}, r"dtype of master is torch.float16, wanted"),
        ({"exp_avg": torch.zeros(6).half()}, r"dtype of exp_avg is torch.float16"),
        ({"exp_avg_sq": torch.zeros(12)[::2]}, r"stride of exp_avg_sq is 2, wanted 1"),
        ({"shadow": torch.zeros(6)}, r"dtype of shadow is torch.float32, wanted torch.bfloat16"),
        ({"master": torch.zeros(6, requires_grad=True)}, r"requires_grad of master is True"),
        ({"lr": torch.zeros(2)}, r"number of elements of lr is 2, wanted 1"),
        ({"lr": torch.tensor(1)}, r"dtype of lr is torch.int64"),
        ({"step": torch.tensor(1, dtype=torch.int32)}, r"dtype of step is torch.int32"),
        ({"blocked": torch.tensor(True)}, r"dtype of blocked is torch.bool, wanted torch.float32"),
        ({"clip_scale": torch.zeros((), device="meta")}, r"device of clip_scale is meta"),
        ({"beta2": 1.0}, r"beta2 is 1.0, wanted at least 0 and below 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named(changed: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "master": torch.zeros(6),
        "grad": torch.zeros(6),
        "exp_avg": torch.zeros(6),
        "exp_avg_sq": torch.zeros(6),
        "shadow": None,
        "clip_scale": None,
        "lr": torch.tensor(1e-3),
        "step": torch.tensor(1.0),
        **NUMBERS,
    }
    with pytest.raises(KernelArgumentError, match=f"adamw_flat_: {message}"):
        adamw_flat_(**{**arguments, **changed})  # type: ignore[arg-type]
