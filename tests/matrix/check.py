"""Whether a cell holds: run on two processes and compared with one."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dtune.resources import resolve_path
from tests.distributed.pool import Pool
from tests.distributed.training import Setup
from tests.matrix.case import LOGIT_LIMIT, STEPS, Curve, Seen
from tests.matrix.cells import Cell

# What ten steps carry on of fp32 sums in another order is a few 1e-6; the claim is 1e-4 a step.
CURVE_LIMIT = 1e-4

# Options without which a method is not itself, or would not be tested.
OPTIONS: dict[str, tuple[tuple[str, Any], ...]] = {}
# At a high learning rate rounding is blown up: LoRA+ takes 16 times as much for B, and PiSSA and
# OLoRA begin with factors as large as the weights.
LR = 3e-3
LR_OF = {"lora_plus": LR / 16, "pissa": LR / 10, "olora": LR / 10}
# Nothing of the tiny model is small enough to be left whole on every rank.
ENGINE_OPTIONS: dict[str, tuple[tuple[str, Any], ...]] = {
    "zero3": (("param_persistence_threshold", 0),)
}


@dataclass(frozen=True)
class Verdict:
    """What a cell came to."""

    cell: Cell
    curve: float
    """Largest relative difference of a loss or gradient norm from one process."""
    resumed: bool
    logits: float
    """Largest relative difference of the exported files' logits."""
    moved: float
    """How far training moved the logits."""
    seconds: float

    @property
    def problems(self) -> list[str]:
        """What does not hold; empty for a good cell."""
        found = []
        if not self.curve <= CURVE_LIMIT:
            found.append(f"curve differs from single by {self.curve:.1e}")
        if not self.resumed:
            found.append("resumed is not bit for bit the same")
        if not self.logits <= LOGIT_LIMIT:
            found.append(f"exported files give other logits, by {self.logits:.1e}")
        if not self.moved > 10 * LOGIT_LIMIT:
            found.append(f"ten steps changed nothing: {self.moved:.1e}")
        return found


def difference(curve: Sequence[tuple[float, float]], expected: Curve) -> float:
    """Largest relative difference of two curves; infinite where one is not finite."""
    assert len(curve) == len(expected) == STEPS
    pairs = [
        (one, other)
        for point, right in zip(curve, expected, strict=True)
        for one, other in zip(point, right, strict=True)
    ]
    if not all(torch.tensor(pair).isfinite().all() for pair in pairs):
        return float("inf")
    return max(abs(one - other) / abs(other) for one, other in pairs)


@dataclass
class Matrix:
    """Checks cells on one pool of two ranks; curves of one process are kept."""

    pool: Pool
    folder: Path
    references: dict[tuple[str, str], Curve] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base = self.folder / "tiny"
        if not self.base.is_dir():
            # Stored in fp32, so that a whole model comes back as it was trained.
            model = AutoModelForCausalLM.from_pretrained(resolve_path("dtune://tiny"))
            model.float().save_pretrained(self.base)
            AutoTokenizer.from_pretrained(resolve_path("dtune://tiny")).save_pretrained(self.base)

    def setup(self, cell: Cell) -> Setup:
        """How a cell is trained."""
        return Setup(
            str(self.base),
            engine=cell.engine,
            engine_options=ENGINE_OPTIONS.get(cell.engine, ()),
            peft=cell.peft,
            peft_options=OPTIONS.get(cell.peft, ()),
            quant=cell.quant,
            steps=STEPS,
            lr=LR_OF.get(cell.peft, LR),
        )

    def reference(self, cell: Cell) -> Curve:
        """Curve of one process."""
        key = (cell.peft, cell.quant)
        if key not in self.references:
            alone = self.setup(cell).alone()
            self.references[key] = self.pool.run("tests.matrix.case:curve", setup=alone)[0]
        return self.references[key]

    def check(self, cell: Cell) -> Verdict:
        """Run a cell. RankError where a rank failed."""
        began = time.monotonic()
        expected = self.reference(cell)
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            ranks: list[Seen | None] = self.pool.run(
                "tests.matrix.case:run_cell",
                setup=self.setup(cell),
                folder=Path(folder) / "exported",
            )
        seen = [rank for rank in ranks if rank is not None]
        assert len(seen) == (1 if cell.engine == "single" else self.pool.size)
        first = seen[0]
        assert all(rank.curve == first.curve for rank in seen), "ranks disagree on the loss of all"
        return Verdict(
            cell,
            difference(first.curve, expected),
            all(rank.resumed for rank in seen),
            first.logits,
            first.moved,
            time.monotonic() - began,
        )


def as_row(verdict: Verdict) -> dict[str, Any]:
    """A verdict as it is written down."""
    row = asdict(verdict)
    return {**row.pop("cell"), **row, "problems": verdict.problems}
