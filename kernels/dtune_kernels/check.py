"""Every op on the user's own device: as near to fp64 as plain PyTorch, and how fast.

The bound: the error against the op's reference in fp64 is at most twice that of plain PyTorch in
the same dtype, or twice one rounding, in the Frobenius norm and at its largest. Integers are equal.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from dtune_kernels.library import Op, Shape, mutated
from dtune_kernels.timing import Ceilings, measure, measure_ceilings, num_copies

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PARITY_TOKENS = 512
"""Tokens of the comparison with fp64, which needs the memory; a multiple of 16, as the tokens of
the layers are, since Triton compiles other code for other numbers."""


@dataclass(frozen=True)
class Parity:
    """How near an op's results and the arguments that it overwrites are to fp64.

    The numbers are those of the result that is nearest to its bound.
    """

    error: float
    """Relative, in the Frobenius norm."""
    plain: float
    """That of plain PyTorch."""
    of_bound: float
    """What the error is of what it may be; more than 1 is wrong."""
    problem: str = ""
    """What is wrong, with the result's name; empty if nothing is."""


@dataclass(frozen=True)
class Speed:
    """Medians of an op and of its plain alternative, and what the op does in that time."""

    seconds: float
    plain_seconds: float
    nbytes: int
    flops: int
    share: float
    """Of the device's measured ceiling: 1 is as fast as it can be."""


@dataclass(frozen=True)
class Row:
    """One op in one dtype for one layer; what is None could not be had, ``problem`` says why."""

    op: str
    dtype: str
    shape: str
    parity: Parity | None
    speed: Speed | None
    problem: str

    @property
    def passed(self) -> bool:
        """Whether it was compared and timed, and is right."""
        return not self.problem


def errors(got: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Return the error in the Frobenius norm and at its largest, relative to ``exact`` (fp64)."""
    difference = got.double() - exact
    return (
        float(difference.norm() / exact.norm()),
        float(difference.abs().max() / exact.abs().max()),
    )


def in_double(value: Any) -> Any:
    """Return an argument with every floating tensor, and every floating dtype, in fp64."""
    if isinstance(value, torch.Tensor):
        return value.to(torch.float64 if value.is_floating_point() else value.dtype, copy=True)
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    if isinstance(value, list | tuple):
        return type(value)(in_double(item) for item in value)
    return value


def cloned(value: Any) -> Any:
    """Return an argument with every tensor cloned, strides included."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, list | tuple):
        return type(value)(cloned(item) for item in value)
    return value


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of an argument or a result, also those in lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def check_parity(
    op: Op, arguments: Sequence[Any], *, run: Callable[..., Any] | None = None
) -> Parity:
    """Compare what an op returns and overwrites with its reference in fp64; keeps the arguments.

    Args:
        op: The op.
        arguments: Of a call, on the device to check.
        run: What is checked; None for the op itself.
    """
    with torch.no_grad():
        ours = _results(op, run or op.call, cloned(arguments))
        plain = _results(op, op.plain, cloned(arguments))
        exact = _results(op, op.reference, in_double(arguments))
        whole: dict[str, torch.Tensor] = {}
        if any(not x.is_floating_point() for x in ours.values()):
            whole = _results(op, op.reference, cloned(arguments))
        if ours.keys() != exact.keys():
            return _wrong(f"returns {list(ours)}, wanted {list(exact)}")
        found = [
            compare(name, got, exact[name], plain[name])
            if got.is_floating_point()
            else compare_integers(name, got, whole[name])
            for name, got in ours.items()
        ]
    return max(found, key=lambda one: (bool(one.problem), one.of_bound))


def compare(name: str, got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> Parity:
    """Judge one floating result by the bound, and the bound by whether it rejects x1.05."""
    if got.shape != exact.shape:
        return _wrong(f"{name} is {list(got.shape)}, wanted {list(exact.shape)}")
    if not torch.isfinite(got).all():
        return _wrong(f"{name} is not finite")
    if not exact.any():
        return _wrong(f"{name} is not 0") if got.any() else Parity(0.0, 0.0, 0.0)
    ours, theirs = errors(got, exact), errors(plain, exact)
    floor = torch.finfo(got.dtype).eps / 2
    bounds = [2 * max(error, floor) for error in theirs]
    of_bound = max(error / bound for error, bound in zip(ours, bounds, strict=True))
    larger = errors(got.double() * 1.05, exact)
    problem = ""
    if not of_bound <= 1:
        problem = f"{name}: errors {_shown(ours)} (norm, largest), plain {_shown(theirs)}"
    elif all(error <= bound for error, bound in zip(larger, bounds, strict=True)):
        problem = f"{name}: plain's errors {_shown(theirs)} are so large that x1.05 would pass"
    return Parity(ours[0], theirs[0], of_bound, problem)


def compare_integers(name: str, got: torch.Tensor, wanted: torch.Tensor) -> Parity:
    """Judge one result of integers, whose error is the share that differs."""
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        there = f"{wanted.dtype} {list(wanted.shape)}"
        return _wrong(f"{name} is {got.dtype} {list(got.shape)}, wanted {there}")
    others = int((got != wanted).sum())
    problem = f"{name}: {others} of {got.numel()} differ from the reference's" if others else ""
    return Parity(others / max(got.numel(), 1), 0.0, math.inf if others else 0.0, problem)


def _wrong(problem: str) -> Parity:
    return Parity(math.nan, math.nan, math.inf, problem)


def time_op(
    op: Op,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    ceilings: Ceilings,
    *,
    rounds: int | None = None,
) -> Speed:
    """Time an op and its plain alternative in turn on a layer's sizes, operands not in cache."""
    with torch.no_grad():
        first = op.arguments(shape, dtype, device)
        cost = op.cost(*first)
        copies = num_copies(sum(x.numel() * x.element_size() for x in tensors_in(first)))
        rotated = [first, *(cloned(first) for _ in range(copies - 1))]
        times = measure(
            {
                "op": [partial(op.call, *arguments) for arguments in rotated],
                "plain": [partial(op.plain, *arguments) for arguments in rotated],
            },
            device,
            rounds=rounds,
        )
    moved = cost.read + cost.written
    seconds = times["op"].median
    share = ceilings.seconds(moved, cost.flops) / seconds
    return Speed(seconds, times["plain"].median, moved, cost.flops, share)


def check_op(
    op: Op,
    shape: Shape,
    dtype: str,
    device: torch.device,
    ceilings: Ceilings,
    *,
    rounds: int | None = None,
) -> Row:
    """Compare and time one op; sets torch's seed.

    What stops a kernel from being compiled or run, such as too little memory, is the row's problem
    and not raised: the other ops are still to be checked.
    """
    torch.manual_seed(0)
    few = replace(shape, tokens=min(shape.tokens, PARITY_TOKENS))
    parity, speed, problem = None, None, ""
    try:
        parity = check_parity(op, op.arguments(few, DTYPES[dtype], device))
        problem = parity.problem
        if not problem:
            speed = time_op(op, shape, DTYPES[dtype], device, ceilings, rounds=rounds)
    except _failures() as error:
        problem = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return Row(op.name, dtype, shape.name, parity, speed, problem)


def check_ops(
    ops: Sequence[Op],
    shape: Shape,
    dtypes: Sequence[str],
    device: torch.device,
    *,
    say: Callable[[str], None],
    rounds: int | None = None,
) -> list[Row]:
    """Check ops in each dtype and say each row of the table as soon as it is known.

    Args:
        ops: Which.
        shape: A layer's sizes.
        dtypes: Names of DTYPES.
        device: Where.
        say: Takes lines.
        rounds: See ``measure``.
    """
    few = min(PARITY_TOKENS, shape.tokens)
    say(f"layer {shape.name}: compared on {few} tokens, timed on {shape.tokens}")
    say(header())
    rows = []
    for dtype in dtypes:
        ceilings = measure_ceilings(device, DTYPES[dtype], rounds=rounds)
        for op in ops:
            rows.append(check_op(op, shape, dtype, device, ceilings, rounds=rounds))
            say(line(rows[-1]))
        bandwidth, flops = ceilings.bandwidth / 1e9, ceilings.flops / 1e12
        say(f"measured in {dtype}: copy {bandwidth:.0f} GB/s, GEMM {flops:.1f} TFLOP/s")
    failed = [f"{row.op} {row.dtype}" for row in rows if not row.passed]
    say(
        f"{len(rows) - len(failed)} passed, {len(failed)} failed{': ' * bool(failed)}"
        + ", ".join(failed)
    )
    return rows


def header() -> str:
    """Return the head of a table of rows."""
    names = "plain", "ms", "plain ms", "GB/s", "TFLOP/s", "share"
    return f"{'op':<24}{'dtype':<6}{'parity':<8}{'error':>9}" + "".join(f"{n:>10}" for n in names)


def line(row: Row) -> str:
    """Return one row of the table."""
    text = f"{row.op:<24}{row.dtype:<6}{'pass' if row.passed else 'FAIL':<8}"
    if row.parity is not None:
        text += f"{row.parity.error:9.1e}{row.parity.plain:10.1e}"
    if row.speed is not None:
        speed = row.speed
        text += (
            f"{speed.seconds * 1e3:10.4f}{speed.plain_seconds * 1e3:10.4f}"
            f"{speed.nbytes / speed.seconds / 1e9:10.1f}{speed.flops / speed.seconds / 1e12:10.3f}"
            f"{speed.share:10.0%}"
        )
    return f"{text}  {row.problem}".rstrip()


def _results(op: Op, run: Callable[..., Any], arguments: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Return what a call returns, and afterwards the arguments that the schema says it writes."""
    returned = run(*arguments)
    found = {f"result {i}": x for i, x in enumerate(tensors_in(returned))}
    for position in mutated(op.call):
        name, value = op.call._schema.arguments[position].name, arguments[position]
        for i, x in enumerate(tensors_in(value)):
            found[f"{name} {i}" if isinstance(value, list) else name] = x
    return found


def _shown(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.1e}, {pair[1]:.1e}"


def _failures() -> tuple[type[Exception], ...]:
    """What a kernel that does not compile, or does not run, raises.

    Triton has the code that launches a kernel compiled by the machine's C compiler.
    """
    failures = (RuntimeError, subprocess.CalledProcessError)
    if importlib.util.find_spec("triton") is None:
        return failures
    return (*failures, importlib.import_module("triton.errors").TritonError)
