"""The page that shows the matrix, made from the results of a run."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from dtune.peft.schema import PEFT
from tests.matrix.case import LOGIT_LIMIT, STEPS
from tests.matrix.cells import ENGINES, QUANTS, Cell, forbidden
from tests.matrix.check import CURVE_LIMIT

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "tests" / "matrix" / "result.json"
README = ROOT / "README.md"
START, END = "<!-- matrix: make matrix -->", "<!-- end of matrix -->"
PAGE = ROOT / "docs" / "matrix.md"

PACKAGES = ("torch", "transformers", "peft", "deepspeed")

HEAD = f"""# The matrix: method x base x engine

Written by `make matrix`, which runs every cell on two processes with the embedded model in fp32.
A cell holds if {STEPS} steps equal those of one process (loss and gradient norm of each step, at
most {CURVE_LIMIT:g} apart), if the steps from the middle, done again from a state, are the same bit
for bit, and if the exported files load in Hugging Face `peft` (or `transformers`, for methods that
export a whole model; in dtune for `adapter`, which `peft` has not) with the same logits (at most
{LOGIT_LIMIT:g} apart). Under `zero3` every parameter is cut into pieces, also those that DeepSpeed
would leave whole. Raw numbers: `tests/matrix/result.json`.
"""


def versions() -> dict[str, str]:
    """What the results were made with."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def render(result: dict[str, Any]) -> str:
    """The page: a table for each base, and the reasons of what does not run."""
    rows = {Cell(row["peft"], row["quant"], row["engine"]): row for row in result["cells"]}
    reasons: list[str] = []
    parts = [HEAD]
    for quant in QUANTS:
        parts.append(f"## quant={quant}\n")
        parts.append(f"| | {' | '.join(ENGINES)} |\n|---{'|---' * len(ENGINES)}|")
        for peft in PEFT.names():
            cells = (Cell(peft, quant, engine) for engine in ENGINES)
            shown = " | ".join(show(cell, rows, reasons) for cell in cells)
            parts.append(f"| `{peft}` | {shown} |")
        parts.append("")
    parts.extend(f"{number}. {reason}" for number, reason in enumerate(reasons, start=1))
    listed = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts.append(f"\nMade with {listed}.")
    return "\n".join(parts) + "\n"


def with_summary(readme: str, result: dict[str, Any]) -> str:
    """README with the matrix in a few rows: methods that run alike share one."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    assert after, f"README has no {START} ... {END}"
    held = {
        Cell(row["peft"], row["quant"], row["engine"])
        for row in result["cells"]
        if not row["problems"]
    }
    alike: dict[tuple[str, ...], list[str]] = {}
    for peft in PEFT.names():
        cells = tuple(
            _engines([e for e in ENGINES if Cell(peft, quant, e) in held]) for quant in QUANTS
        )
        alike.setdefault(cells, []).append(peft)
    lines = [
        f"| `peft=` | {' | '.join(f'`quant={quant}`' for quant in QUANTS)} |",
        f"|---{'|---' * len(QUANTS)}|",
        *(f"| `{', '.join(names)}` | {' | '.join(cells)} |" for cells, names in alike.items()),
        "",
        f"{len(held)} cells, each run on two processes: [docs/matrix.md](docs/matrix.md).",
    ]
    return f"{before}{START}\n" + "\n".join(lines) + f"\n{END}{after}"


def _engines(names: list[str]) -> str:
    if len(names) == len(ENGINES):
        return "every engine"
    return ", ".join(names) or "no"


def show(cell: Cell, rows: dict[Cell, dict[str, Any]], reasons: list[str]) -> str:
    """A cell of the table: the largest difference of its curve, or the reason below."""
    rule = forbidden(cell)
    if rule is not None:
        reason = f"No: {rule.reason}. Use {rule.instead}."
        if reason not in reasons:
            reasons.append(reason)
        return f"no ({reasons.index(reason) + 1})"
    row = rows.get(cell)
    if row is None:
        return "not run"
    return "FAILS" if row["problems"] else f"{row['curve']:.0e}"
