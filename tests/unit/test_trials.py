"""What a sweep makes of the metrics of a trial."""

from __future__ import annotations

import json
from pathlib import Path

from hydra_plugins.dtune_launcher._trials import Scores, objective_of, read_scores

from dtune.checkpoint.schema import Best
from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.config.run import RunConfig

ROWS = [
    {"kind": "eval", "step": 0, "loss": 0.1, "exact_match": 1.0},
    {"kind": "train", "step": 1, "loss": 5.0},
    {"kind": "eval", "step": 1, "loss": 3.0, "exact_match": 0.2},
    {"kind": "train", "step": 2, "loss": 4.0},
    {"kind": "eval", "step": 2, "loss": 2.0, "exact_match": 0.1},
    {"kind": "train", "step": 3, "loss": 3.5},
    {"kind": "train", "step": 4, "loss": None},
    {"kind": "eval", "step": 4, "loss": 2.5, "exact_match": 0.2},
]


def folder_of(path: Path, rows: list[dict[str, object]], rest: str = "") -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "metrics.jsonl").write_text(text + rest)
    return path


def run_of(*overrides: str) -> RunConfig:
    return load_frozen(compose_overrides("train", list(overrides)))


def test_scores_are_of_the_best_evaluation_after_the_start(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ROWS, rest='{"kind": "ev')
    by_loss = Scores(loss=2.0, exact_match=0.1, train_loss=3.5)
    assert read_scores(folder, Best.loss) == by_loss
    by_match = Scores(loss=3.0, exact_match=0.2, train_loss=3.5)
    assert read_scores(folder, Best.exact_match) == by_match


def test_a_loss_in_training_never_stands_for_a_held_out_one(tmp_path: Path) -> None:
    assert read_scores(tmp_path, Best.loss) == Scores()
    trained = [row for row in ROWS if row["kind"] == "train"]
    scores = read_scores(folder_of(tmp_path, trained), Best.loss)
    assert scores == Scores(train_loss=3.5)
    assert objective_of(run_of("data.eval_path=held.jsonl"), scores) is None


def test_what_a_sweeper_is_given_follows_from_the_settings() -> None:
    scores = Scores(loss=2.0, exact_match=0.1, train_loss=3.5)
    held = "data.eval_path=held.jsonl"
    assert objective_of(run_of(held), scores) == 2.0
    assert objective_of(run_of(held, "checkpoint.best=exact_match"), scores) == 0.1
    assert objective_of(run_of("data.eval_path=none"), scores) == 3.5
