"""Who goes on from whose checkpoint, and whether it holds."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dtune.checkpoint.layout import step_name
from dtune.checkpoint.reader import CHECKPOINTS
from tests.distributed.moving import (
    METHODS,
    ROWS,
    Lengths,
    Seen,
    Step,
    frozen,
    in_order,
    small_model,
    whole_tensors,
)
from tests.distributed.pool import Pool

# Of the loss over all ranks, which is about 7: a few roundings of fp32, carried on ten times.
LOSS_LIMIT = 1e-5
ENGINES = ("single", "ddp", "fsdp", "zero1", "zero2", "zero3")
WORLDS = (1, 2, 3, 4)


@dataclass(frozen=True, order=True)
class Point:
    """An engine on a number of processes."""

    engine: str
    world: int

    def __str__(self) -> str:
        return f"{self.engine} x {self.world}"


# ``single`` on several processes is refused.
POINTS = tuple(Point(e, w) for e in ENGINES for w in WORLDS if e != "single" or w == 1)


@dataclass(frozen=True, order=True)
class Move:
    """What ``source`` has saved, gone on with by ``target``."""

    peft: str
    source: Point
    target: Point

    def __str__(self) -> str:
        return f"{self.peft}: {self.source} -> {self.target}"


def all_moves() -> list[Move]:
    """Every source with every target under both methods."""
    return [Move(p, source, target) for p in METHODS for source in POINTS for target in POINTS]


def cover(*, each: int = 3) -> list[Move]:
    """Few of the moves that have every ordered pair of engines, and of worlds where there is one.

    Every source is read by at least ``each`` targets, and every target reads as many sources.
    A source has one method only.
    """
    peft = {point: METHODS[number % 2] for number, point in enumerate(POINTS)}
    moves = [Move(peft[source], source, target) for source in POINTS for target in POINTS]
    chosen: list[Move] = []
    pairs: set[tuple[str, str] | tuple[int, int]] = set()
    reads, readers = dict.fromkeys(POINTS, 0), dict.fromkeys(POINTS, 0)

    def gain(move: Move) -> float:
        new = len(_pairs(move) - pairs)
        short = (reads[move.target] < each) + (readers[move.source] < each)
        # Where all is alike, the one that has been taken least.
        return 2 * new + 2 * short - 0.1 * (reads[move.target] + readers[move.source])

    while min(*reads.values(), *readers.values()) < each or len(pairs) < 36 + 16:
        best = max((move for move in moves if move not in chosen), key=gain)
        chosen.append(best)
        pairs |= _pairs(best)
        reads[best.target] += 1
        readers[best.source] += 1
    return sorted(chosen)


def _pairs(move: Move) -> set[tuple[str, str] | tuple[int, int]]:
    return {
        (move.source.engine, move.target.engine),
        (move.source.world, move.target.world),
    }


@dataclass(frozen=True)
class Verdict:
    """What a move came to."""

    move: Move
    unequal: tuple[str, ...]
    """Tensors that were not bit for bit what the files hold, or were not loaded as a whole."""
    loss: float
    """Largest difference of a loss from that of the run that was not interrupted."""
    same_order: bool
    """Whether the sequences of each step were those of that run, in its order."""
    once: bool
    """Whether every row came once in each epoch."""

    @property
    def problems(self) -> list[str]:
        """What does not hold; empty for a good move."""
        found = []
        if self.unequal:
            found.append(f"{len(self.unequal)} tensors were not loaded as they are")
        if not self.loss <= LOSS_LIMIT:
            found.append(f"losses differ by {self.loss:.1e}")
        if self.move.source == self.move.target and self.loss != 0.0:
            found.append(f"losses are not bit for bit the same: {self.loss:.1e}")
        if not self.same_order:
            found.append("the sequences of a step are others, or in another order")
        if not self.once:
            found.append("a row came twice in an epoch, or not at all")
        return found


@dataclass(frozen=True)
class Source:
    """A run that was not interrupted, and its checkpoint."""

    ranks: list[Seen]
    folder: Path
    tensors: dict[str, int]
    """Elements of each tensor of the checkpoint."""


@dataclass
class Mover:
    """Makes and reads checkpoints, on a pool for each number of processes."""

    folder: Path
    lengths: Lengths
    pools: dict[int, Pool]
    sources: dict[tuple[str, Point], Source] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.model = small_model(self.folder / "model")

    def source(self, peft: str, point: Point) -> Source:
        """The run of a point, made on first use. Asserts that its checkpoint is what it had."""
        key = (peft, point)
        if key not in self.sources:
            run_dir = self.folder / f"source-{peft}-{point.engine}-{point.world}"
            text = self._text(peft, point, run_dir)
            ranks = self.pools[point.world].run(
                "tests.distributed.moving:write", text=text, saved=self.lengths.saved
            )
            folder = run_dir / CHECKPOINTS / step_name(self.lengths.saved)
            sizes = {name: values.numel() for name, values in whole_tensors(folder).items()}
            self.sources[key] = source = Source(ranks, folder, sizes)
            wrong = not_as_saved(ranks, sizes)
            assert not wrong, f"{peft}: {point} has saved what it had not: {wrong[:3]}"
            assert source.ranks[0].losses.keys() == set(range(1, self.lengths.total + 1))
        return self.sources[key]

    def check(self, move: Move) -> Verdict:
        """Go on with a source, in a folder that is deleted afterwards."""
        source = self.source(move.peft, move.source)
        run_dir = self.folder / "target"
        ranks = self.pools[move.target.world].run(
            "tests.distributed.moving:read",
            text=self._text(move.peft, move.target, run_dir, resume=source.folder),
            folder=source.folder,
        )
        shutil.rmtree(run_dir)
        return judge(move, source, ranks, self.lengths)

    def _text(self, peft: str, point: Point, run_dir: Path, *, resume: Path | None = None) -> str:
        return frozen(
            self.model,
            run_dir,
            engine=point.engine,
            world=point.world,
            peft=peft,
            lengths=self.lengths,
            resume=resume,
        )


def not_as_saved(ranks: Sequence[Seen], sizes: dict[str, int]) -> list[str]:
    """Tensors that a rank holds otherwise than the files, or that no ranks together hold whole."""
    wrong = {name for seen in ranks for name in seen.unequal}
    for name in sizes.keys() | {name for seen in ranks for name in seen.ranges}:
        at = 0
        for start, stop in sorted(seen.ranges.get(name, (0, 0)) for seen in ranks):
            at = max(at, stop) if start <= at else at
        if at != sizes.get(name):
            wrong.add(name)
    return sorted(wrong)


def judge(move: Move, source: Source, ranks: Sequence[Seen], lengths: Lengths) -> Verdict:
    """Compare what the ranks of a target did with the run that was not interrupted."""
    first, *others = ranks
    assert all(seen.losses in ({}, first.losses) for seen in others)
    steps = range(lengths.saved + 1, lengths.total + 1)
    expected = source.ranks[0].losses
    loss = math.inf
    if list(first.losses) == list(steps):
        differences = [abs(first.losses[step] - expected[step]) for step in steps]
        # Of what is no number, max() may return either.
        loss = max(differences) if all(map(math.isfinite, differences)) else math.inf
    before, after = in_order(source.ranks), in_order(ranks)
    order = [before[step] for step in range(1, lengths.saved + 1)]
    order += [after.get(step, []) for step in steps]
    return Verdict(
        move,
        tuple(not_as_saved(ranks, source.tensors)),
        loss,
        list(after) == list(steps) and all(after[step] == before[step] for step in steps),
        comes_once(order, first.sequences_per_epoch),
    )


def comes_once(order: Sequence[Step], sequences_per_epoch: int) -> bool:
    """Whether each whole epoch has every row once, and the last, part of one, none twice."""
    sequences = [rows for step in order for rows in step]
    for start in range(0, len(sequences), sequences_per_epoch):
        part = sequences[start : start + sequences_per_epoch]
        rows = sorted(row for sequence in part for row in sequence)
        whole = len(part) == sequences_per_epoch
        if len(set(rows)) != len(rows) or (whole and rows != list(range(ROWS))):
            return False
    return len(sequences) > sequences_per_epoch


def as_row(verdict: Verdict) -> dict[str, Any]:
    """A verdict as it is written down."""
    move = verdict.move
    row = asdict(verdict)
    del row["move"]
    # Two digits would differ from one run to the next.
    row["loss"] = float(f"{verdict.loss:.0e}")
    return {
        "peft": move.peft,
        "source": str(move.source),
        "target": str(move.target),
        **row,
        "problems": verdict.problems,
    }
