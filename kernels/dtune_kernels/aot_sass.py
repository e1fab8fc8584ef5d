"""What a compiled kernel asks of the GPU, read from its cubin with the tools that Triton ships."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.M)
_ADDRESS = re.compile(r"0x([0-9a-f]+)\s*$")
_WGMMA = re.compile(r"[A-Z]GMMA\b")
_TCGEN05 = re.compile(r"UTC[A-Z]*MMA\b")
_MMA_SYNC = re.compile(r"[A-Z]MMA\b")
_WAIT = "SYNCS"


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction; ``name`` is the opcode with its modifiers, ``LDG.E.128``."""

    address: int
    name: str
    operands: str

    @property
    def opcode(self) -> str:
        """The name without modifiers."""
        return self.name.partition(".")[0]

    @property
    def width(self) -> int:
        """Bytes that a load or a store moves for one thread."""
        modifiers = self.name.split(".")
        for modifier, size in (("256", 32), ("128", 16), ("64", 8)):
            if modifier in modifiers:
                return size
        if {"U8", "S8"} & set(modifiers):
            return 1
        return 2 if {"U16", "S16"} & set(modifiers) else 4


@dataclass(frozen=True)
class Cubin:
    """Resources and instructions of one kernel."""

    registers: int
    """Of a thread."""
    stack: int
    """Bytes of local memory that a thread has: what does not fit into its registers."""
    code: tuple[Instruction, ...]
    """Without padding."""

    def count(self, *opcodes: str) -> int:
        """Instructions with one of the opcodes."""
        return sum(instruction.opcode in opcodes for instruction in self.code)

    def widths(self, *opcodes: str) -> list[int]:
        """Bytes a thread moves, for each load or store with one of the opcodes."""
        return [x.width for x in self.code if x.opcode in opcodes]

    @property
    def wgmma(self) -> int:
        """Tensor-core instructions of a warp group (Hopper)."""
        return self._count(_WGMMA)

    @property
    def tcgen05(self) -> int:
        """Tensor-core instructions of a block (Blackwell)."""
        return self._count(_TCGEN05)

    @property
    def mma_sync(self) -> int:
        """Tensor-core instructions of a warp."""
        return self._count(_MMA_SYNC)

    def _count(self, pattern: re.Pattern[str]) -> int:
        return sum(pattern.fullmatch(x.opcode) is not None for x in self.code)


def read_cubin(cubin: bytes) -> Cubin:
    """Return what is in a cubin with one kernel; runs ``cuobjdump`` and ``nvdisasm``."""
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [tool, "-res-usage", "-sass", file.name],
            check=True,
            capture_output=True,
            text=True,
            # cuobjdump starts nvdisasm by its name.
            env={"PATH": str(Path(tool).parent)},
        ).stdout
    return parse(listing)


def parse(listing: str) -> Cubin:
    """Return what ``cuobjdump -res-usage -sass`` lists for one kernel."""
    usage = _USAGE.findall(listing)
    if len(usage) != 1:
        raise ValueError(f"one kernel is wanted in a cubin, this one has {len(usage)}")
    registers, stack, local = map(int, usage[0])
    code = [
        Instruction(int(at, 16), name, rest) for at, name, rest in _INSTRUCTION.findall(listing)
    ]
    if not code:
        raise ValueError("cuobjdump lists no instructions")
    kept = [x for x in code if x.opcode != "NOP" and _jump(x) != x.address]
    return Cubin(registers, stack + local, tuple(kept))


def per_element(code: Sequence[Instruction], itemsize: int, most: float) -> float:
    """Return the instructions that a thread issues for each element it stores to global memory.

    The region that is counted is the innermost loop with stores to global memory, the one that
    stores most if there are several (what is unrolled and the rest); a program that stores outside
    of loops is counted from its first instruction to its last, both sides of every branch, start
    and addresses included. A predicated instruction counts as one. The elements are the bytes that
    the region's stores write, divided by ``itemsize``, and never more than ``most``, so that
    elements which several threads write count once.

    Infinite where nothing is stored, and where a loop inside the region runs for an unknown number
    of times; loops that wait for a barrier do not count as such.

    Args:
        code: A kernel's instructions.
        itemsize: Bytes of a result's element.
        most: Elements of the results that a thread has to write in all.
    """
    loops = [span for span in _loops(code) if _stored(_within(code, span))]
    smallest = [span for span in loops if not any(_inside(other, span) for other in loops)]
    whole = (code[0].address, code[-1].address)
    region = max(smallest, key=lambda span: _stored(_within(code, span)), default=whole)
    body = _within(code, region)
    elements = min(_stored(body) / itemsize, most)
    unknown = any(
        _inside(span, region) and all(x.opcode != _WAIT for x in _within(code, span))
        for span in _loops(code)
    )
    return float("inf") if unknown or not elements else len(body) / elements


Span = tuple[int, int]
"""Addresses of a region's first and last instruction."""


def _jump(instruction: Instruction) -> int | None:
    """Address that a branch goes to."""
    found = _ADDRESS.search(instruction.operands) if instruction.opcode == "BRA" else None
    return int(found[1], 16) if found else None


def _loops(code: Iterable[Instruction]) -> list[Span]:
    """Regions that end with a branch to their start."""
    jumps = [(_jump(x), x.address) for x in code]
    return [(target, at) for target, at in jumps if target is not None and target < at]


def _within(code: Iterable[Instruction], span: Span) -> list[Instruction]:
    return [x for x in code if span[0] <= x.address <= span[1]]


def _inside(inner: Span, outer: Span) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def _stored(code: Iterable[Instruction]) -> int:
    """Bytes that a thread stores to global memory."""
    return sum(x.width for x in code if x.opcode == "STG")
