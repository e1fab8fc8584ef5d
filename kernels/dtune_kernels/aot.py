"""Every kernel of the catalog, compiled for GPUs that are not there, and judged by its code.

``python -m dtune_kernels.aot`` calls the launchers of all ops with tensors on the meta device, for
the layers of real models, compiles each launch as it would be compiled on the GPU, with what Triton
specialises on (divisibility by 16, integers that are 1, None), and reads registers, local and
shared memory and instructions from the result. It prints a table and exits with 1 if a gate fails.

The gates:

- spills: no local memory; registers hold everything;
- shared memory: what a block may have on the target;
- tensor cores: on sm_90 every ``tl.dot`` on them is a wgmma, elsewhere a tensor-core instruction;
- dequantisers (ops ``dequantize*``): few instructions for each element (see
  ``aot_sass.per_element``), loads of 128 bits, and nothing but stores of 128 bits.

Of sizes that are 1 only the first two, and that they compile, are asked.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from dtune_kernels.aot_cases import EDGE, Planned, plan
from dtune_kernels.aot_sass import Cubin, per_element, read_cubin
from dtune_kernels.catalog import CATALOG, Op
from dtune_kernels.errors import KernelUnavailable
from dtune_kernels.launch import Launch

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a block may have, by target: CUDA C++ programming guide, table
"Technical specifications per compute capability"."""
TARGETS = tuple(SHARED_LIMIT)
MAX_PER_ELEMENT = 8.0
"""Instructions: an H200's memory, 4.8 TB/s, is full with 1.9e12 elements a second of 4 bits read
and 16 written; with 8 instructions each those are 46 % of what it issues (132 multiprocessors, 4
warps a cycle, 1.98 GHz)."""
WIDE = 16
"""Bytes of the widest load or store that all targets have."""

_DOT = re.compile(r"\btt\.dot(?:_scaled)? (.*?) : tensor<(\w+)[,>].*?\* tensor<(\w+)[,>]")


@dataclass(frozen=True)
class Row:
    """One kernel, as compiled for one target."""

    op: str
    kernel: str
    case: str
    """The first case that is compiled to it."""
    target: int
    error: str = ""
    """Why it does not compile."""
    warps: int = 0
    registers: int = 0
    spilled: int = 0
    """Bytes of a thread."""
    shared: int = 0
    """Bytes of a block."""
    loads: int = 0
    """Instructions that load from global memory, also to shared memory."""
    wide_loads: int = 0
    """Those of 128 bits or more for a thread."""
    stores: int = 0
    wide_stores: int = 0
    dots: int = 0
    """``tl.dot`` on tensor cores; not those in fp32 proper."""
    left: tuple[str, ...] = ()
    """Tiles of those that are no wgmma (sm_90) or tcgen05 (sm_100) instruction."""
    wgmma: int = 0
    tcgen05: int = 0
    mma_sync: int = 0
    instructions: int = 0
    per_element: float | None = None
    """Instructions for each element, of a dequantiser."""


def gates(row: Row) -> list[str]:
    """Return which gates a kernel does not pass, each with the number that decides."""
    if row.error:
        return [f"compiles: {row.error}"]
    found = []
    if row.spilled:
        found.append(f"spills: {row.spilled} bytes a thread, wanted 0")
    if row.shared > SHARED_LIMIT[row.target]:
        limit = SHARED_LIMIT[row.target]
        found.append(f"shared memory: {row.shared} bytes a block, wanted at most {limit}")
    if row.case == EDGE.name:
        return found
    if row.target == 90 and row.left:
        tiles = ", ".join(row.left)
        found.append(f"tensor cores: {len(row.left)} of {row.dots} dots are no wgmma: {tiles}")
    if row.dots and not row.wgmma + row.tcgen05 + row.mma_sync:
        found.append(f"tensor cores: no instruction of theirs for {row.dots} dots")
    if row.per_element is not None:
        found += _decoder_gates(row, row.per_element)
    return found


def _decoder_gates(row: Row, instructions: float) -> Iterator[str]:
    if instructions > MAX_PER_ELEMENT:
        yield f"instructions: {instructions:.2f} an element, wanted at most {MAX_PER_ELEMENT:g}"
    if not row.wide_loads:
        yield f"128-bit loads: none of {row.loads}"
    if row.wide_stores < row.stores or not row.stores:
        yield f"128-bit stores: {row.wide_stores} of {row.stores}"


class _Absent:
    """What Triton asks its driver before it compiles, answered for a GPU that is not there."""

    def __init__(self, target: int) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        """Triton keeps what it has compiled by device: one for each target."""
        return self.target

    def get_current_stream(self, device: int) -> int:
        return 0


def measure(planned: Sequence[Planned], target: int) -> list[Row]:
    """Compile launches for a target; one row for each op and variant of a kernel.

    Raises:
        KernelUnavailable: Triton is absent, or interprets kernels in this process.
    """
    _require_compiler()
    from triton.runtime.driver import driver

    driver.set_active(_Absent(target))
    rows: dict[tuple[str, str], Row] = {}
    cubins: dict[str, Cubin] = {}
    for each in planned:
        compiled, error = _compile(each.launch)
        if error:
            rows.setdefault((each.op, error), _row(each, target, error=error))
        elif (each.op, compiled.hash) not in rows:
            if compiled.hash not in cubins:
                cubins[compiled.hash] = read_cubin(compiled.asm["cubin"])
            rows[each.op, compiled.hash] = _measured(each, target, compiled, cubins[compiled.hash])
    return list(rows.values())


def _require_compiler() -> None:
    if importlib.util.find_spec("triton") is None:
        raise KernelUnavailable("kernels cannot be compiled: the package triton is not installed")
    from triton import knobs

    if knobs.runtime.interpret:
        raise KernelUnavailable("kernels are not compiled while TRITON_INTERPRET is set; unset it")


def _compile(launch: Launch) -> tuple[Any, str]:
    """Return the compiled kernel, and why there is none."""
    from triton.errors import TritonError

    kernel, grid, arguments, options = launch
    try:
        return kernel.warmup(*arguments, grid=grid, **options), ""
    except (TritonError, RuntimeError) as error:
        # Each call of one @triton.jit function by another adds its place; the first says why.
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        return None, f"{type(first).__name__}: {first}"


def _row(planned: Planned, target: int, **values: Any) -> Row:
    kernel = planned.launch[0]
    name = f"{kernel.__module__.removeprefix('dtune_kernels.')}.{kernel.__name__}"
    return Row(planned.op, name, planned.case, target, **values)


def _measured(planned: Planned, target: int, compiled: Any, cubin: Cubin) -> Row:
    loads, stores = cubin.widths("LDG", "LDGSTS"), cubin.widths("STG")
    decoder = planned.op.startswith("dequantize")
    threads = math.prod(planned.launch[1]) * compiled.metadata.num_warps * 32
    return _row(
        planned,
        target,
        warps=compiled.metadata.num_warps,
        registers=cubin.registers,
        spilled=cubin.stack,
        shared=compiled.metadata.shared,
        loads=len(loads),
        wide_loads=sum(width >= WIDE for width in loads),
        stores=len(stores),
        wide_stores=sum(width >= WIDE for width in stores),
        dots=len(_dots(compiled.asm["ttir"])),
        left=tuple(_dots(compiled.asm["ttgir"])) if target >= 90 else (),
        wgmma=cubin.wgmma,
        tcgen05=cubin.tcgen05,
        mma_sync=cubin.mma_sync,
        instructions=len(cubin.code),
        per_element=per_element(cubin.code, planned.itemsize, planned.results / threads)
        if decoder
        else None,
    )


def _dots(ir: str) -> list[str]:
    """Return the tiles of the ``tt.dot`` that tensor cores can do: "64x16xbf16 * 16x64xbf16"."""
    return [
        f"{a} * {b}"
        for rest, a, b in _DOT.findall(ir)
        if not a.endswith("f64") and (not a.endswith("xf32") or "inputPrecision = " in rest)
    ]


_plan: list[list[Planned]] = []
"""The launches of each kernel; processes of ``measure_all`` inherit it."""


def measure_all(ops: Sequence[Op], targets: Sequence[int], jobs: int) -> list[Row]:
    """Compile every launch of the ops for every target, in ``jobs`` processes; see ``measure``."""
    _require_compiler()
    planned: dict[Any, list[Planned]] = {}
    for op in ops:
        for each in plan(op):
            planned.setdefault(each.launch[0], []).append(each)
    _plan[:] = planned.values()
    # All launches of a kernel in one process, which compiles what is equal once.
    tasks = [(kernel, target) for target in targets for kernel in range(len(_plan))]
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(jobs, mp_context=fork) as pool:
        rows = [row for some in pool.map(_measure_one, tasks) for row in some]
    order = {op.name: at for at, op in enumerate(ops)}
    return sorted(rows, key=lambda row: order[row.op])


def _measure_one(task: tuple[int, int]) -> list[Row]:
    kernel, target = task
    return measure(_plan[kernel], target)


HEADER = (
    "op",
    "kernel",
    "case",
    "sm",
    "warps",
    "regs",
    "spill B",
    "shared KiB",
    "128-bit loads",
    "128-bit stores",
    "dots",
    "tensor-core instr",
    "instr",
    "instr/element",
)


def table(rows: Sequence[Row]) -> str:
    """Return rows as aligned text."""
    lines = [HEADER, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cells(row: Row) -> tuple[str, ...]:
    tensor_core = {"wgmma": row.wgmma, "tcgen05": row.tcgen05, "mma.sync": row.mma_sync}
    return (
        row.op,
        row.kernel,
        row.case,
        str(row.target),
        str(row.warps),
        str(row.registers),
        str(row.spilled),
        f"{row.shared / 1024:.1f}",
        f"{row.wide_loads}/{row.loads}",
        f"{row.wide_stores}/{row.stores}",
        str(row.dots),
        " ".join(f"{count} {name}" for name, count in tensor_core.items() if count),
        str(row.instructions),
        "" if row.per_element is None else f"{row.per_element:.2f}",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and the gates that fail; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dtune_kernels.aot", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", action="store_true", help="print rows and failures as JSON")
    parser.add_argument("--target", type=int, action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--op", action="append", choices=list(CATALOG), help="default: all")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes")
    chosen = parser.parse_args(arguments)
    ops = [op for name, op in CATALOG.items() if not chosen.op or name in chosen.op]
    rows = measure_all(ops, chosen.target or TARGETS, chosen.jobs)
    failures = [
        f"{row.kernel} ({row.op}, {row.case}) on sm_{row.target}: {failure}"
        for row in rows
        for failure in gates(row)
    ]
    if chosen.json:
        text = json.dumps({"rows": [asdict(row) for row in rows], "failures": failures}, indent=1)
    else:
        verdict = [f"{len(rows)} kernels, {len(failures)} failures", *failures]
        text = "\n".join([table(rows), "", *verdict])
    sys.stdout.write(text + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
