"""``dtune eval``: loss and exact match of what a run has trained, or of a model as it is."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dtune.commands.own import Command, split_settings
from dtune.commands.trained import Trained, choose_trained, one_process
from dtune.config.support import check_run
from dtune.errors import ConfigError

if TYPE_CHECKING:
    from dtune.evaluate.heldout import HeldOut


@dataclass
class EvalSettings:
    """Settings of ``dtune eval``."""

    # Folder of the run whose weights are evaluated; without it the model of the settings.
    run_dir: str = ""
    # Weights of the run: last, or best by checkpoint.best.
    export: str = ""


COMMAND = Command(
    name="dtune eval",
    usage="dtune eval run_dir=RUN [settings]: loss and exact match of what a run has trained.",
    own=EvalSettings,
    unused=frozenset({"parallel", "launch"}),
    why_unused="runs in one process",
)


def run(argv: list[str]) -> int:
    """Evaluate, print the scores, and keep them beside the run."""
    if COMMAND.asks_help(argv):
        sys.stdout.write(COMMAND.help())
        return 0
    own, settings = split_settings(argv, EvalSettings, COMMAND)
    trained = choose_trained(own.run_dir, own.export, settings)
    if trained is None:
        return 0
    if trained.config.data.eval_path == "none":
        raise ConfigError("data.eval_path=none: name the held-out rows to evaluate on")
    check_run(trained.config, 1)
    metrics, held_out = _evaluate(trained)
    _write(metrics, held_out, trained.folder, weights=trained.weights)
    return 0


def _evaluate(trained: Trained) -> tuple[dict[str, float], HeldOut]:
    # Only now, because a wrong setting is answered before torch is imported.
    from dtune.inference import assemble_evaluation

    with one_process() as world:
        engine, held_out = assemble_evaluation(trained.config, world, trained.exported)
        return held_out(engine), held_out


def _write(
    metrics: dict[str, float], held_out: HeldOut, folder: Path | None, *, weights: str
) -> None:
    for name, value in metrics.items():
        sys.stdout.write(f"{name:<14} {value:.4f}\n")
    for task, value in held_out.by_task.items():
        sys.stdout.write(f"  {task:<12} {value:.4f}\n")
    if folder is not None:
        record = {"weights": weights, **metrics, "by_task": held_out.by_task}
        (folder / "eval.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        answers = [json.dumps(asdict(answer), ensure_ascii=False) for answer in held_out.answers]
        (folder / "answers.jsonl").write_text("\n".join(answers) + "\n", encoding="utf-8")
        sys.stdout.write(f"scores in {folder / 'eval.json'}, answers in answers.jsonl beside it\n")
