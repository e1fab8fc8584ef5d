"""Every kernel, compiled for sm_80, sm_90 and sm_100 without a GPU, passes the gates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from dtune_kernels.aot import SHARED_LIMIT, TARGETS, Row, gates, measure, table
from dtune_kernels.aot_sass import parse, per_element
from dtune_kernels.catalog import CATALOG
from dtune_kernels.errors import KernelUnavailable

KERNELS = Path(__file__).parents[2] / "kernels"

GOOD = Row(
    "dequantize_some",
    "some.triton._kernel",
    "8b bf16",
    90,
    warps=4,
    registers=128,
    shared=SHARED_LIMIT[90],
    loads=3,
    wide_loads=1,
    stores=4,
    wide_stores=4,
    dots=1,
    wgmma=4,
    per_element=8.0,
)
BAD = {
    "compiles: no": {"error": "no"},
    "spills: 8 bytes": {"spilled": 8},
    "shared memory: 232449 bytes": {"shared": SHARED_LIMIT[90] + 1},
    "shared memory: 166913 bytes": {"target": 80, "shared": SHARED_LIMIT[80] + 1},
    "tensor cores: 1 of 2 dots are no wgmma: 16x64xbf16": {
        "dots": 2,
        "left": ("16x64xbf16 * 64x64xbf16",),
    },
    "tensor cores: no instruction": {"wgmma": 0},
    "instructions: 8.01 an element": {"per_element": 8.01},
    "128-bit loads: none of 3": {"wide_loads": 0},
    "128-bit stores: 3 of 4": {"wide_stores": 3},
    "128-bit stores: 0 of 0": {"stores": 0, "wide_stores": 0},
}

BAD_KERNELS = """
import json, sys
import torch, triton, triton.language as tl
from dtune_kernels.aot import Planned, gates, measure

@triton.jit
def spills(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at)
    tl.debug_barrier()
    tl.store(y_ptr + at, tl.cumsum(x) * y + x)

@triton.jit
def few_rows(x_ptr, y_ptr, BLOCK: tl.constexpr):
    row = tl.arange(0, 16)[:, None]
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * BLOCK + column[None, :])
    w = tl.load(x_ptr + column[:, None] * BLOCK + column[None, :])
    tl.store(y_ptr + row * BLOCK + column[None, :], tl.dot(x, w).to(tl.bfloat16))

@triton.jit
def narrow(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + 2 * at, tl.exp(tl.exp(tl.load(x_ptr + 3 * at).to(tl.float32))))

def planned(kernel, block, **options):
    x = torch.empty(1 << 20, dtype=torch.bfloat16, device="meta")
    launch = (kernel, (1,), (x, x, block), options)
    return Planned("dequantize_badly", "case", launch, block, x.element_size())

kernels = [planned(spills, 8192, maxnreg=32), planned(few_rows, 64), planned(narrow, 1024)]
rows = measure(kernels, 90)
print(json.dumps({row.kernel.rpartition(".")[2]: gates(row) for row in rows}))
"""

LISTING = """
 Function decode:
  REG:40 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:552 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0000*/                   S2R R0, SR_TID.X ;               /* 0x0000000000007919 */
                                                                    /* 0x000e220000002100 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ; /* 0x0000000000007919 */
        /*0020*/              @!P0 FMUL R4, R4, R0 ;                /* 0x0000000000007919 */
        /*0030*/                   STG.E.128 desc[UR4][R2.64], R4 ; /* 0x0000000000007919 */
        /*0040*/                   {after}
        /*0050*/                   EXIT ;                           /* 0x0000000000007919 */
        /*0060*/                   BRA 0x60;                        /* 0x0000000000007919 */
        /*0070*/                   NOP;                             /* 0x0000000000007919 */
"""


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python where kernels are compiled; in this process they are interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(KERNELS)
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_every_kernel_passes_every_gate_on_every_target() -> None:
    done = run("-m", "dtune_kernels.aot", "--json")
    assert done.returncode in (0, 1), done.stderr
    found = json.loads(done.stdout)
    rows = [Row(**{**row, "left": tuple(row["left"])}) for row in found["rows"]]
    assert {(row.op, row.target) for row in rows} == {(op, t) for op in CATALOG for t in TARGETS}
    assert done.returncode == bool(found["failures"])
    failures = [failure for row in rows for failure in gates(row)]
    assert len(failures) == len(found["failures"])
    assert not failures, "\n".join([table(rows), "", *found["failures"]])


@pytest.mark.slow
def test_kernels_that_are_bad_are_found_out(tmp_path: Path) -> None:
    script = tmp_path / "bad_kernels.py"
    script.write_text(BAD_KERNELS)
    done = run(script)
    assert done.returncode == 0, done.stderr
    found = {kernel: "; ".join(failures) for kernel, failures in json.loads(done.stdout).items()}
    assert "spills: " in found["spills"]
    assert "1 of 1 dots are no wgmma: 16x64xbf16 * 64x64xbf16" in found["few_rows"]
    assert "spills: " not in found["few_rows"]
    assert "instructions: " in found["narrow"]
    assert "128-bit loads: none of 8" in found["narrow"]
    assert "128-bit stores: 0 of 8" in found["narrow"]


def test_a_good_kernel_passes() -> None:
    assert gates(GOOD) == []


@pytest.mark.parametrize("failure", BAD)
def test_each_gate_can_fail(failure: str) -> None:
    (found,) = gates(replace(GOOD, **BAD[failure]))
    assert found.startswith(failure)


def test_only_dequantisers_are_held_to_their_gates() -> None:
    assert gates(replace(GOOD, per_element=None, wide_loads=0, wide_stores=0)) == []


def test_a_listing_is_read() -> None:
    cubin = parse(LISTING.replace("{after}", "HGMMA.64x16x16.F32.BF16 R4, gdesc[UR4], R4 ;"))
    assert (cubin.registers, cubin.stack, cubin.wgmma, cubin.mma_sync) == (40, 0, 1, 0)
    assert cubin.widths("LDG") == [16]
    assert len(cubin.code) == 6


@pytest.mark.parametrize(
    ("after", "wanted"),
    [
        # All six instructions, or the four of the loop, for 16 bytes of 2-byte elements.
        ("FADD R4, R4, R5 ;", 6 / 8),
        ("BRA 0x10 ;", 4 / 8),
        # What only jumps to itself is padding.
        ("BRA 0x40 ;", 5 / 8),
    ],
)
def test_instructions_of_an_element_are_those_of_the_loop_that_stores_it(
    after: str, wanted: float
) -> None:
    cubin = parse(LISTING.replace("{after}", after))
    assert per_element(cubin.code, itemsize=2, most=8) == wanted
    assert per_element(cubin.code, itemsize=2, most=4) == 2 * wanted


def test_what_cannot_be_counted_is_infinite() -> None:
    looping = LISTING.replace("FMUL R4, R4, R0 ;", "BRA 0x10 ;").replace("{after}", "NOP ;")
    assert per_element(parse(looping).code, itemsize=2, most=8) == float("inf")
    storeless = LISTING.replace("STG.E.128", "STS.128").replace("{after}", "NOP ;")
    assert per_element(parse(storeless).code, itemsize=2, most=8) == float("inf")


def test_interpreted_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(KernelUnavailable, match="TRITON_INTERPRET is set"):
        measure([], 90)
