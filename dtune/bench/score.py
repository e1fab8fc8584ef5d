"""What a method learns in so many steps: a run of ``dtune train``, and its held-out scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from dtune_launch.spec import JobSpec

from dtune.bench.cases import Case
from dtune.bench.record import Score
from dtune.config.freeze import load_frozen
from dtune.run_folder import occupied_run_folder
from dtune.runtime.status import State, read_status


def score_case(
    case: Case, folder: Path, command: Sequence[str], start: Callable[[JobSpec], int]
) -> tuple[Score | None, str]:
    """Train a case on the data of its config and score it on the held-out rows.

    The run is one of ``dtune train`` in ``folder``; ``start`` starts its processes and gives their
    exit code. Returns the score, or None and why there is none.
    """
    text = case.text_in(folder, {"train.max_steps": case.bench.train_steps, "log.every": 1})
    run = load_frozen(text)
    with occupied_run_folder(run, text, command=command):
        (folder / "logs").mkdir(exist_ok=True)
        code = start(JobSpec("dtune.worker", (str(folder),), folder, case.nproc))
    status = read_status(folder)
    if status.state is not State.done:
        return None, status.message or f"the run has ended as {status.state.value}, code {code}"
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return Score(result["steps"], result["tokens"], result["after"], _losses(folder)), ""


def _losses(folder: Path) -> tuple[tuple[int, float], ...]:
    """Step and training loss of every step that was logged."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return tuple((row["step"], row["loss"]) for row in rows if row["kind"] == "train")
