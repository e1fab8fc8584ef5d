"""How the work of the LoRA ops is cut into launches, tiles and shares: functions of sizes alone.

A *share* is one program's part of a sum. Shares are written side by side and added up in one order
afterwards, which gives the same bits every time.

Size legend: T tokens, K or N features, R rank, S multiprocessors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from dtune_kernels.launch import next_power_of_two

PROJECT_WIDTH = 256
"""Ranks that one launch of ``lora_project`` holds in registers: 64 rows of fp32 sums."""
GRAD_WIDTH = 128
"""Ranks that one launch of ``lora_grad_a`` holds in registers: 256 columns of fp32 sums."""
ONE_PASS_WIDTH = 32
"""Ranks of a linear up to which one pass over dy, which writes the shares of dS, moves less than
two: with R = 64 the shares alone are larger than dy."""

BLOCK_R = 32
"""Ranks of one ``tl.dot`` of P with B; more are taken in turn."""


@dataclass(frozen=True)
class Piece:
    """Some of an adapter's ranks, small enough for a launch."""

    adapter: int
    first: int
    """First of the adapter's ranks."""
    rank: int
    column: int
    """First column in the group's [T, sum of R]."""

    @property
    def padded(self) -> int:
        """Ranks of the tile: a power of two, as ``tl.dot`` wants it."""
        return padded(self.rank)


@dataclass(frozen=True)
class Tiles:
    """Tile of a program, shares of its sums, and the kernel's options."""

    rows: int
    columns: int
    shares: int
    warps: int
    stages: int


def ceil_div(size: int, by: int) -> int:
    """Parts of at most ``by`` that ``size`` is cut into."""
    return -(-size // by)


@cache
def padded(rank: int) -> int:
    """Ranks of a tile that holds ``rank``."""
    return max(16, next_power_of_two(rank))


def rank_blocks(ranks: Sequence[int]) -> tuple[int, ...]:
    """Ranks of one ``tl.dot`` of P with B, of each adapter."""
    return tuple(min(BLOCK_R, padded(rank)) for rank in ranks)


def columns_of(ranks: Sequence[int]) -> list[int]:
    """First column of each adapter in the group's [T, sum of R]."""
    return [sum(ranks[:index]) for index in range(len(ranks))]


def first_adapters(member: Sequence[int], count: int) -> tuple[int, ...]:
    """Where each of ``count`` matrices has its first adapter in the list, and the list's end."""
    assert list(member) == sorted(member), member
    return tuple(sum(each < index for each in member) for index in range(count + 1))


def in_one_pass(ranks: Sequence[int], member: Sequence[int]) -> list[int]:
    """Matrices dy of which one pass gives dS and dB; the others are read twice."""
    widths = dict.fromkeys(member, 0)
    for rank, owner in zip(ranks, member, strict=True):
        widths[owner] += padded(rank)
    return [owner for owner, width in widths.items() if width <= ONE_PASS_WIDTH]


def passes(ranks: Sequence[int], width: int) -> Sequence[Sequence[Piece]]:
    """Cut adapters so that the padded ranks of each launch fit into ``width``."""
    return _passes(tuple(ranks), width)


@cache
def _passes(ranks: tuple[int, ...], width: int) -> list[list[Piece]]:
    launches: list[list[Piece]] = []
    used = width
    for adapter, (rank, column) in enumerate(zip(ranks, columns_of(ranks), strict=True)):
        for first in range(0, rank, width):
            piece = Piece(adapter, first, min(rank - first, width), column + first)
            if used + piece.padded > width:
                launches.append([])
                used = 0
            launches[-1].append(piece)
            used += piece.padded
    return launches


def project_tiles(
    tokens: int,
    features: int,
    pieces: Sequence[Piece],
    *,
    itemsize: int,
    processors: int,
    dropout: bool,
) -> Tiles:
    """Cut x [T, K]: all of K in one program once T fills the GPU, else shares of K.

    Args:
        tokens: T.
        features: K.
        pieces: What one launch computes.
        itemsize: Bytes of an element of x.
        processors: S.
        dropout: Whether something is dropped: masks need registers.
    """
    width = sum(piece.padded for piece in pieces)
    tall = tokens >= 128 * processors and width <= 64 and itemsize == 2 and not dropout
    rows = 128 if tall else padded(min(tokens, 64))
    if dropout:
        columns = 64 if len(pieces) == 1 and width <= 64 else 32
    else:
        columns = 128 if width <= 64 else 64 if width <= 128 else 32
    columns = min(columns if itemsize == 2 else columns // 2, padded(features))
    blocks = ceil_div(tokens, rows)
    shares = min(max(1, processors // max(blocks, 1)), ceil_div(features, 4 * columns))
    few = itemsize == 2 and rows * width <= 8192 and not dropout
    return Tiles(rows, columns, shares, warps=4 if few else 8, stages=3 if tall else 4)


def grad_a_tiles(
    tokens: int,
    features: int,
    pieces: Sequence[Piece],
    *,
    itemsize: int,
    processors: int,
    dropout: bool,
) -> Tiles:
    """Cut x [T, K]: a program sums its columns over its share of T. As ``project_tiles``."""
    width = sum(piece.padded for piece in pieces)
    wide = itemsize == 2 and width <= 64 and not dropout
    columns = min(256 if wide else 64 if dropout and width > 64 else 128, padded(features))
    rows = padded(min(tokens, 64 if itemsize == 2 else 32))
    blocks = ceil_div(tokens, rows)
    shares = min(max(1, processors // ceil_div(features, columns)), ceil_div(blocks, 4))
    return Tiles(rows, columns, shares, warps=8, stages=3)


def grad_b_tiles(tokens: int, features: Sequence[int], *, itemsize: int, processors: int) -> Tiles:
    """Cut the dy [T, N] of a group: a program sums dB of its columns over its share of T.

    It also writes its columns' share of dS for each of its rows. With N = 4096, T = 8192 and
    S = 132, shares of dS and dB together are least at about 512 columns.
    """
    columns = min(512 if itemsize == 2 else 256, max(padded(size) for size in features))
    rows = padded(min(tokens, 64 if itemsize == 2 else 32))
    tiles = sum(ceil_div(size, columns) for size in features)
    shares = min(max(1, processors // tiles), ceil_div(tokens, 4 * rows))
    return Tiles(rows, columns, shares, warps=8, stages=2)


def expand_tiles(tokens: int, features: int, ranks: Sequence[int], *, itemsize: int) -> Tiles:
    """Cut y [T, N]: every program has a tile of its own."""
    rows = padded(min(tokens, 64))
    columns = 128 if max(ranks) <= BLOCK_R else 64
    columns = min(columns if itemsize == 2 else columns // 2, padded(features))
    return Tiles(rows, columns, 1, warps=8 if rows * columns >= 8192 else 4, stages=2)


def glu_tiles(tokens: int, features: int, ranks: Sequence[int], *, itemsize: int) -> Tiles:
    """Cut gate and up [T, F]: three tiles of fp32 in registers at once.

    Args:
        tokens: T.
        features: F.
        ranks: Of all adapters, in the backward: where some are taken in turn, 4 warps would spill.
        itemsize: Bytes of an element of gate.
    """
    rows = padded(min(tokens, 64))
    columns = min(64 if itemsize == 2 else 32, padded(features))
    few = itemsize == 2 and all(rank <= BLOCK_R for rank in ranks)
    return Tiles(rows, columns, 1, warps=4 if few else 8, stages=2)
