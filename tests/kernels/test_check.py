"""The check that users run on their GPU, on the CPU: what it passes, and what it must not pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from dtune_kernels import timing
from dtune_kernels.catalog import CATALOG, LLAMA_8B, SMALL, Op
from dtune_kernels.check import (
    DTYPES,
    PARITY_TOKENS,
    Row,
    check_op,
    check_ops,
    check_parity,
    compare,
    line,
    time_op,
)
from dtune_kernels.timing import Ceilings, measure, measure_ceilings, num_copies

from tests.kernels.compare import accepts

CPU = torch.device("cpu")
CEILINGS = Ceilings(bandwidth=1e9, flops=1e9)
Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def _few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "COLD_BYTES", 1 << 10)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("op", list(CATALOG.values()), ids=list(CATALOG))
def test_the_reference_passes_in_every_dtype(op: Op, dtype: str) -> None:
    row = check_op(op, SMALL, dtype, CPU, CEILINGS, rounds=1)
    assert row.passed, row.problem
    assert row.parity is not None
    assert row.parity.of_bound <= 1
    assert row.speed is not None
    assert row.speed.seconds > 0


def zeros(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(x)


def five_percent_more(x: torch.Tensor) -> torch.Tensor:
    return x * 1.05 if x.is_floating_point() else x + 1


def not_a_number(x: torch.Tensor) -> torch.Tensor:
    return x * float("nan") if x.is_floating_point() else x + 1


def one_element_off(x: torch.Tensor) -> torch.Tensor:
    x[(-1,) * x.dim()] += 1
    return x


def shorter(x: torch.Tensor) -> torch.Tensor:
    return x[:-1]


def spoiled(op: Op, spoil: Callable[[torch.Tensor], torch.Tensor]) -> Run:
    """The op with its first result, or the first argument that it writes, spoiled."""

    def run(*arguments: Any) -> Any:
        result = op.call(*arguments)
        if result is None:
            first = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
            first.copy_(spoil(first))
            return None
        if isinstance(result, torch.Tensor):
            return spoil(result)
        first, *rest = result
        return spoil(first), *rest

    return run


RETURNING = ["rms_norm", "quantize_4bit", "dequantize_4bit", "glu", "lora_grad_b", "rope"]
WRITING = ["adamw_flat_", "rope_", "lora_expand_", "cross_entropy_grad_"]


@pytest.mark.parametrize("spoil", [zeros, five_percent_more, not_a_number, one_element_off])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("name", RETURNING + WRITING)
def test_wrong_results_fail(name: str, dtype: str, spoil: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    op = CATALOG[name]
    arguments = op.arguments(SMALL, DTYPES[dtype], CPU)
    assert check_parity(op, arguments).problem == ""
    assert check_parity(op, arguments, run=spoiled(op, spoil)).problem


@pytest.mark.parametrize("name", RETURNING)
def test_a_wrong_shape_fails(name: str) -> None:
    op = CATALOG[name]
    arguments = op.arguments(SMALL, torch.bfloat16, CPU)
    assert "wanted" in check_parity(op, arguments, run=spoiled(op, shorter)).problem


@pytest.mark.parametrize("name", WRITING)
def test_what_is_not_written_fails(name: str) -> None:
    op = CATALOG[name]
    arguments = op.arguments(SMALL, torch.float32, CPU)
    assert check_parity(op, arguments, run=lambda *_: None).problem


def test_arguments_are_kept_as_they_were() -> None:
    op = CATALOG["adamw_flat_"]
    arguments = op.arguments(SMALL, torch.bfloat16, CPU)
    before = [x.clone() for x in arguments if isinstance(x, torch.Tensor)]
    check_parity(op, arguments)
    after = [x for x in arguments if isinstance(x, torch.Tensor)]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_a_bound_that_lets_five_percent_pass_is_a_failure() -> None:
    exact = torch.randn(100, dtype=torch.double)
    plain = (exact * 1.1).float()
    assert "x1.05 would pass" in compare("y", exact.float(), exact, plain).problem


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES))
def test_the_bound_is_that_of_the_other_tests(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    exact = torch.randn(1000, dtype=torch.double)
    plain = exact.to(dtype)
    outcomes = set()
    for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 10.0):
        noise = size * torch.finfo(dtype).eps * torch.randn_like(exact)
        got = (exact + noise).to(dtype)
        passed = compare("y", got, exact, plain).problem == ""
        assert passed is accepts(got, exact, plain)
        outcomes.add(passed)
    assert outcomes == {True, False}


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_what_an_op_raises_is_its_rows_problem(error: type[Exception]) -> None:
    def fail(*_: Any) -> None:
        raise error("CUDA out of memory.\nTried to allocate")

    op = replace(CATALOG["glu"], plain=fail)
    row = check_op(op, SMALL, "bf16", CPU, CEILINGS, rounds=1)
    assert not row.passed
    assert f"{error.__name__}: CUDA out of memory." in line(row)


def test_bugs_are_raised() -> None:
    op = replace(CATALOG["glu"], plain=lambda: None)
    with pytest.raises(TypeError):
        check_op(op, SMALL, "bf16", CPU, CEILINGS, rounds=1)


def test_the_share_is_of_the_ceiling_that_binds() -> None:
    op = CATALOG["glu"]
    cost = op.cost(*op.arguments(SMALL, torch.float32, CPU))
    moved = cost.read + cost.written
    slow_memory = Ceilings(bandwidth=1.0, flops=1e30)
    speed = time_op(op, SMALL, torch.float32, CPU, slow_memory, rounds=1)
    assert speed.share == pytest.approx(moved / speed.seconds)
    slow_arithmetic = Ceilings(bandwidth=1e30, flops=1.0)
    speed = time_op(op, SMALL, torch.float32, CPU, slow_arithmetic, rounds=1)
    assert speed.share == pytest.approx(cost.flops / speed.seconds)


def test_the_table_has_a_row_for_each_op_and_dtype() -> None:
    said: list[str] = []
    broken = replace(CATALOG["rope"], plain=CATALOG["rope"].reference, call=CATALOG["rope"].call)
    broken = replace(broken, reference=lambda *a: tuple(2 * x for x in broken.plain(*a)))
    ops = [CATALOG["rms_norm"], broken]
    rows = check_ops(ops, SMALL, ["bf16", "fp32"], CPU, say=said.append, rounds=1)
    assert [(row.op, row.dtype, row.passed) for row in rows] == [
        ("rms_norm", "bf16", True),
        ("rope", "bf16", False),
        ("rms_norm", "fp32", True),
        ("rope", "fp32", False),
    ]
    table = "\n".join(said)
    assert all(line(row) in table for row in rows)
    assert said[-1] == "2 passed, 2 failed: rope bf16, rope fp32"
    assert table.count("GEMM") == 2


def test_a_row_without_numbers_says_why() -> None:
    row = Row("glu", "bf16", "8b", None, None, "RuntimeError: no")
    assert line(row).split() == ["glu", "bf16", "FAIL", "RuntimeError:", "no"]


def test_tokens_of_the_comparison_take_the_code_that_is_timed() -> None:
    # Triton compiles integers that are multiples of 16 to other code.
    assert (PARITY_TOKENS % 16, LLAMA_8B.tokens % 16) == (0, 0)


def test_alternatives_and_operands_take_turns() -> None:
    called: list[str] = []
    calls = {
        name: [lambda name=name, i=i: called.append(f"{name}{i}") for i in range(2)]  # type: ignore[misc]
        for name in "ab"
    }
    found = measure(calls, CPU, rounds=3)
    assert called[-6:] == ["a0", "b0", "a1", "b1", "a0", "b0"]
    assert {timing.samples for timing in found.values()} == {3}
    assert all(0 <= one.low <= one.median <= one.high for one in found.values())


def test_no_sample_is_the_first_to_hold_a_result() -> None:
    # What a result needs for the first time is allocated by the device, which takes time.
    alive: list[int] = []
    results = weakref.WeakSet[torch.Tensor]()

    def call() -> torch.Tensor:
        alive.append(len(results))
        result = torch.zeros(1)
        results.add(result)
        return result

    measure({"a": [call] * 4}, CPU, rounds=6)
    assert alive[-6:] == [4] * 6


def test_time_decides_on_the_number_of_samples() -> None:
    calls = {"a": [lambda: None]}
    assert measure(calls, CPU, seconds=0.0)["a"].samples == timing.MIN_ROUNDS
    assert measure(calls, CPU, seconds=1.0)["a"].samples == timing.MAX_ROUNDS


def test_copies_of_operands_are_more_than_a_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "COLD_BYTES", 100)
    assert [num_copies(size) for size in (1, 10, 30, 100, 10**9)] == [64, 10, 4, 1, 1]


def test_ceilings_are_positive() -> None:
    ceilings = measure_ceilings(CPU, torch.float32, rounds=1)
    assert ceilings.bandwidth > 0
    assert ceilings.flops > 0
