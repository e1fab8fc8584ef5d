"""What a sweep makes of the metrics of a trial."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.config.run import RunConfig
from dtune.sweep.metrics import MetricsTail, Objective, Scores, objective_of, read_scores
from dtune.train.sinks.jsonl import read_metrics

LOSS = Objective("loss", "minimize")
MATCH = Objective("exact_match", "maximize")
TRAIN = Objective("train_loss", "minimize")

ROWS: list[dict[str, Any]] = [
    {"kind": "eval", "step": 0, "loss": 0.1, "exact_match": 1.0},
    {"kind": "train", "step": 1, "loss": 5.0, "tokens_per_second": 10.0},
    {"kind": "eval", "step": 1, "loss": 3.0, "exact_match": 0.2},
    {"kind": "train", "step": 2, "loss": 4.0, "tokens_per_second": 20.0},
    {"kind": "eval", "step": 2, "loss": 2.0, "exact_match": 0.1},
    {"kind": "train", "step": 3, "loss": 3.5, "tokens_per_second": 30.0},
    {"kind": "train", "step": 4, "loss": None, "tokens_per_second": 40.0},
    {"kind": "eval", "step": 4, "loss": 2.5, "exact_match": 0.2},
]


def folder_of(path: Path, rows: list[dict[str, Any]], rest: str = "") -> Path:
    (path / "metrics.jsonl").write_text(text_of(rows) + rest)
    return path


def text_of(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def run_of(*overrides: str) -> RunConfig:
    return load_frozen(compose_overrides("train", list(overrides)))


def test_scores_are_of_the_best_evaluation_after_the_start(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ROWS, rest='{"kind": "ev')
    last = {"train_loss": 3.5, "tokens_per_second": 40.0, "step": 4}
    by_loss = read_scores(folder, LOSS)
    assert by_loss == Scores(loss=2.0, exact_match=0.1, **last)
    by_match = read_scores(folder, MATCH)
    assert by_match == Scores(loss=3.0, exact_match=0.2, **last)
    assert [by_loss.value(one) for one in (LOSS, MATCH, TRAIN)] == [2.0, 0.1, 3.5]


def test_a_loss_in_training_never_stands_for_a_held_out_one(tmp_path: Path) -> None:
    assert read_scores(tmp_path, LOSS) == Scores()
    trained = [row for row in ROWS if row["kind"] == "train"]
    scores = read_scores(folder_of(tmp_path, trained), LOSS)
    assert scores.value(LOSS) is None
    assert scores.value(TRAIN) == 3.5


def test_what_decides_follows_from_the_settings() -> None:
    held = "data.eval_path=held.jsonl"
    assert objective_of(run_of(held)) == LOSS
    assert objective_of(run_of(held, "checkpoint.best=exact_match")) == MATCH
    assert objective_of(run_of("data.eval_path=none")) == TRAIN


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_rows_that_come_piece_by_piece_read_as_those_that_came_at_once(
    tmp_path: Path, cut: int
) -> None:
    again = [{"kind": "resume", "step": 2}, {"kind": "eval", "step": 3, "loss": 1.0}]
    text, file = text_of([*ROWS, *again]), tmp_path / "metrics.jsonl"
    tail = MetricsTail(file)
    assert tail.update().scores(LOSS) == Scores()
    for end in range(0, len(text) + cut, cut):
        file.write_text(text[:end])
        tail.update()
    assert tail.scores(LOSS) == read_scores(tmp_path, LOSS)
    # A resumed run replaces what came after the step that it goes on from, as for every reader.
    evaluated = [row for row in read_metrics(file) if row["kind"] == "eval" and row["step"]]
    assert tail.evaluations == evaluated
    assert [row["step"] for row in tail.evaluations] == [1, 2, 3]
    assert tail.scores(LOSS).train_loss == 4.0


def test_the_file_of_another_run_is_read_from_its_start(tmp_path: Path) -> None:
    tail = MetricsTail(folder_of(tmp_path, ROWS) / "metrics.jsonl").update()
    folder_of(tmp_path, [{"kind": "eval", "step": 1, "loss": 9.0}])
    assert tail.update().scores(LOSS) == Scores(loss=9.0, step=1)
