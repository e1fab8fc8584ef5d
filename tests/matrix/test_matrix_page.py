"""The committed results of the matrix are of what is legal now, and are shown as they are."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from tests.matrix.cells import legal_cells
from tests.matrix.page import PAGE, README, RESULT, render, with_summary
from tests.matrix.run import name_of


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """What the last run has written."""
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return found


def test_every_legal_cell_was_run_and_holds(result: dict[str, Any]) -> None:
    assert {name_of(row) for row in result["cells"]} == set(map(str, legal_cells()))
    assert not [row for row in result["cells"] if row["problems"]]


def test_pages_show_the_results(result: dict[str, Any]) -> None:
    readme = README.read_text(encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == render(result), "run `make matrix`"
    assert readme == with_summary(readme, result), "run `make matrix`"


def test_a_cell_that_fails_is_shown(result: dict[str, Any]) -> None:
    failing = copy.deepcopy(result)
    failing["cells"][-1]["problems"] = ["resumed is not bit for bit the same"]
    assert "FAILS" in render(failing)
    assert "FAILS" not in render(result)
    readme = README.read_text(encoding="utf-8")
    assert with_summary(readme, failing) != with_summary(readme, result)
