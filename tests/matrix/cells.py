"""The cells of the matrix: method x base x engine, those that are legal, and a pairwise cover."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from dtune.config.support import Illegal, find_illegal
from dtune.parallel.schema import engines
from dtune.peft.schema import PEFT

QUANTS = ("none", "nf4", "int8")
ENGINES = tuple(sorted(engines(), key=lambda name: (name != "single", name)))

# What a cell does not choose.
DEFAULTS = {
    "kernels": "torch",
    "precision": "fp32",
    "objective": "sft",
    "optim": "adamw",
    "train.recompute": "none",
    "train.compile": "false",
    "train.offload_activations": "false",
}


@dataclass(frozen=True, order=True)
class Cell:
    """One combination."""

    peft: str
    quant: str
    engine: str

    def __str__(self) -> str:
        return f"{self.peft}-{self.quant}-{self.engine}"

    def pairs(self) -> frozenset[tuple[str, str]]:
        """The combinations of two that it covers."""
        return frozenset(
            itertools.combinations(
                (f"peft={self.peft}", f"quant={self.quant}", f"parallel={self.engine}"), 2
            )
        )


def all_cells() -> list[Cell]:
    """Every combination, legal or not, in the order of the table."""
    return [Cell(*names) for names in itertools.product(PEFT.names(), QUANTS, ENGINES)]


def forbidden(cell: Cell) -> Illegal | None:
    """The rule that forbids a cell; None where it is legal."""
    chosen = {"peft": cell.peft, "quant": cell.quant, "parallel": cell.engine}
    return find_illegal({**DEFAULTS, **chosen})


def legal_cells() -> list[Cell]:
    """Every combination that ``config/support.py`` calls legal."""
    return [cell for cell in all_cells() if forbidden(cell) is None]


def pairwise(cells: Sequence[Cell]) -> list[Cell]:
    """Few of the cells that cover each pair of options that any of them has, greedily."""
    missing = set().union(*(cell.pairs() for cell in cells))
    chosen: list[Cell] = []
    while missing:
        best = max(cells, key=lambda cell: len(cell.pairs() & missing))
        chosen.append(best)
        missing -= best.pairs()
    return sorted(chosen)
