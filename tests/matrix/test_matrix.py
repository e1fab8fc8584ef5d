"""A pairwise cover of the matrix: every method with every engine and every base, and so on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.distributed.pool import Pool
from tests.matrix.case import LOGIT_LIMIT
from tests.matrix.cells import Cell, forbidden, legal_cells, pairwise
from tests.matrix.check import CURVE_LIMIT, Matrix, Verdict, difference


@pytest.fixture(scope="module")
def matrix(two_ranks: Pool, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(two_ranks, tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("cell", pairwise(legal_cells()), ids=str)
def test_cell_holds(matrix: Matrix, cell: Cell) -> None:
    """Ten steps equal one process, resumed bit for bit, and the export loads with its logits."""
    verdict = matrix.check(cell)
    assert not verdict.problems


def test_the_cover_has_every_legal_pair() -> None:
    legal = legal_cells()
    covered = set().union(*(cell.pairs() for cell in pairwise(legal)))
    assert covered == set().union(*(cell.pairs() for cell in legal))
    assert all(forbidden(cell) is None for cell in legal)


def test_a_cell_that_does_not_hold_is_told() -> None:
    good = Verdict(Cell("lora", "none", "fsdp"), 1e-6, True, 1e-6, 0.1, 1.0)
    assert not good.problems
    for wrong in (
        replace(good, curve=2 * CURVE_LIMIT),
        replace(good, curve=float("nan")),
        replace(good, resumed=False),
        replace(good, logits=2 * LOGIT_LIMIT),
        replace(good, logits=-1.0, moved=float("nan")),
        replace(good, moved=LOGIT_LIMIT),
    ):
        assert wrong.problems, wrong
    curve = [(2.0, 1.0)] * 10
    assert difference([(2.0, 1.0)] * 9 + [(2.0, 1.001)], curve) == pytest.approx(1e-3)
    assert difference([(float("nan"), 1.0)] * 10, curve) == float("inf")
