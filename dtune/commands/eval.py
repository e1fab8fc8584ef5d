"""``dtune eval``: loss and exact match of what a run has trained, or of a model as it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dtune_launch.spec import LaunchConfig

from dtune.config.compose import check_flags, compose
from dtune.config.freeze import load_frozen, read_frozen
from dtune.config.run import RunConfig
from dtune.config.suggest import all_keys
from dtune.config.support import check_run
from dtune.errors import ConfigError
from dtune.optim.schema.adamw import AdamwConfig
from dtune.parallel.schema.single import SingleConfig
from dtune.patch.schema import Backend
from dtune.run_folder import EXPORTS
from dtune.runtime.schema import LogConfig

if TYPE_CHECKING:
    from dtune.evaluate.heldout import HeldOut

# Settings of this command itself.
_OWN = ("run_dir", "export")


def run(argv: list[str]) -> int:
    """Evaluate, print the scores, and keep them beside the run."""
    _check_settings(argv)
    run_dir = _value(argv, "run_dir")
    folder = Path(run_dir).expanduser() if run_dir else None
    if folder is None:
        if _value(argv, "export"):
            raise ConfigError("export chooses among the weights of a run: set run_dir as well")
        text = compose("eval", argv)
        if text is None:
            return 0
        config, exported = load_frozen(text), None
    else:
        check_flags(argv)
        settings = [argument for argument in argv if argument.partition("=")[0] not in _OWN]
        export = _find_export(folder, _value(argv, "export") or "last")
        config, exported = _read_run(folder, settings, export)
    if config.data.eval_path == "none":
        raise ConfigError("data.eval_path=none: name the held-out rows to evaluate on")
    config = _without_training(config)
    check_run(config, 1)
    metrics, held_out = _evaluate(config, exported)
    _write(metrics, held_out, folder, weights=str(exported or config.model.path))
    return 0


def _check_settings(argv: Sequence[str]) -> None:
    """Refuse what an evaluation has no use for, instead of ignoring it."""
    for argument in argv:
        key = argument.partition("=")[0].lstrip("+")
        if key.split(".")[0] in ("parallel", "launch"):
            raise ConfigError(f"dtune eval runs in one process: leave {argument} out")


def _without_training(config: RunConfig) -> RunConfig:
    """The config without what only training needs, and without the packages of that.

    Kernels are used where they can run: what was trained with them is the same without.
    """
    kernels = config.kernels
    if kernels.name is not Backend.torch:
        kernels = replace(kernels, name=Backend.auto)
    return replace(
        config,
        kernels=kernels,
        parallel=SingleConfig(),
        optim=AdamwConfig(),
        log=LogConfig(),
        launch=LaunchConfig(),
    )


def _as_keys(settings: Sequence[str]) -> list[str]:
    """Settings to put over a frozen config, where a group can no longer be chosen as a whole.

    ``precision``, which is one key, is put as that key; ConfigError for any other group.
    """
    groups = {field.name for field in fields(RunConfig)} - {"run_dir", "resume", "seed"}
    keys = []
    for setting in settings:
        key, _, value = setting.partition("=")
        if key == "precision":
            keys.append(f"precision.name={value}")
        elif key in groups:
            own = [known for known in all_keys() if known.startswith(f"{key}.")][:3]
            raise ConfigError(
                f"{setting}: the {key} of a run is frozen and is not chosen anew; set keys of it"
                f"{', such as ' + ', '.join(own) if own else ''}"
            )
        else:
            keys.append(setting)
    return keys


def _read_run(
    folder: Path, settings: Sequence[str], exported: Path
) -> tuple[RunConfig, Path | None]:
    """The frozen config of a run with settings over it, and what to load over its base.

    What a full run exports is a model by itself, with its tokenizer: it takes the place of the
    base, which need not be there any more. Code that the base brings is not exported.
    """
    keys = _as_keys(settings)
    run = read_frozen(folder, keys)
    named = any(key.startswith("model.path=") for key in keys)
    if named or run.peft.name != "full" or run.model.trust_remote_code:
        return run, exported
    own = [f"model.path={exported}", "model.tokenizer=same", "model.chat_template=same"]
    return read_frozen(folder, [*own, "model.init=pretrained", *keys]), None


def _value(argv: Sequence[str], name: str) -> str:
    """What a setting of this command says; empty where it is not given."""
    return next((a.partition("=")[2] for a in argv if a.partition("=")[0] == name), "")


def _find_export(folder: Path, which: str) -> Path:
    """Exported weights of the last step of a run, or of its best one, which may be the last."""
    if which not in ("last", "best"):
        raise ConfigError(f"export={which} is not one of last, best")
    last = next((folder / name for name in EXPORTS if (folder / name).is_dir()), None)
    if last is None:
        raise ConfigError(
            f"run_dir={folder} has no {' or '.join(EXPORTS)} yet: let the run end "
            f"(dtune train run_dir={folder} resume=auto ...)"
        )
    if which == "last":
        return last
    best = last.with_name(f"best-{last.name}")
    if best.is_dir():
        return best
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    if result["best_step"] == result["steps"]:
        return last
    raise ConfigError(
        f"run_dir={folder} has no {best.name}: "
        + (
            f"the checkpoint of its best step {result['best_step']} was not whole"
            if result["best_step"] > 0
            else "no evaluation has told the best step; set data.eval_path and train.eval_every"
        )
    )


def _evaluate(config: RunConfig, exported: Path | None) -> tuple[dict[str, float], HeldOut]:
    # Only now, because a wrong setting is answered before torch is imported.
    from dtune.assemble import assemble_evaluation
    from dtune.runtime.logs import start_logging
    from dtune.runtime.world import World

    world = World.start()
    start_logging(world.rank, None)
    engine, held_out = assemble_evaluation(config, world, exported)
    metrics = held_out(engine)
    world.stop()
    return metrics, held_out


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
