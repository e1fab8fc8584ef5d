"""Predict steps on many GPUs and write ``docs/scaling.md``: ``python -m benchmarks.scaling.run``.

With ``--page`` only the page is written, from the results as they are. Beside what is predicted it
shows what ``python -m tests.distributed.traffic_run`` has counted. Needs no GPU and no weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.scaling.page import render
from benchmarks.scaling.predict import GPUS, WORKS, Prediction, as_json, predict

ROOT = Path(__file__).parents[2]
COUNTED = ROOT / "benchmarks" / "results" / "communication-cpu.json"
RESULT = ROOT / "benchmarks" / "results" / "scaling.json"
PAGE = ROOT / "docs" / "scaling.md"


def main(arguments: list[str]) -> int:
    """Predict and write; the exit code."""
    if arguments not in ([], ["--page"]):
        print("usage: python -m benchmarks.scaling.run [--page]", file=sys.stderr)
        return 2
    if not arguments:
        found: list[Prediction] = []
        for work in WORKS:
            for gpus in GPUS:
                found += predict(work, gpus)
                print(f"{work.name} on {gpus:,} GPUs", flush=True)
        lines = ",\n".join(json.dumps(row) for row in as_json(found))
        RESULT.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    PAGE.write_text(render(counted(), predictions()), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


def counted() -> dict[str, Any]:
    """What ranks of this machine have sent."""
    found: dict[str, Any] = json.loads(COUNTED.read_text(encoding="utf-8"))
    return found


def predictions() -> list[Prediction]:
    """As they were last written."""
    return [Prediction(**row) for row in json.loads(RESULT.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
