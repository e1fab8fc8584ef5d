"""The start of a run from what others have written: an adapter, a model, or DeepSpeed's state."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtune.commands.trained import one_process
from dtune.config.compose import compose
from dtune.config.freeze import load_frozen
from dtune.config.support import check_run
from dtune.errors import ConfigError
from dtune.evaluate.adapter_files import read_adapter
from dtune.runtime.files import published_folder


@dataclass(frozen=True)
class Given:
    """What is converted."""

    folder: Path
    kind: str
    """``adapter``, ``model`` or ``universal``."""
    steps: int
    """Optimizer steps done where the user has said so; -1: not."""


def start_run(given: Given, out: Path, settings: Sequence[str]) -> str:
    """Write a run folder with one checkpoint, which ``resume`` takes; what to say of it."""
    implied = _implied(given, settings)
    text = compose("train", [*implied, *settings, f"run_dir={out}"])
    if text is None:
        return ""
    run = load_frozen(text)
    check_run(run, 1)
    with one_process() as world, published_folder(out) as temporary:
        # Only here, because a wrong setting is answered before torch is imported.
        from dtune.commands.convert_state import write_start, write_universal

        (temporary / "config.yaml").write_text(text, encoding="utf-8")
        if given.kind == "universal":
            step = write_universal(given.folder, given.steps, run, temporary, world)
        else:
            step = write_start(run, temporary, world)
        facts = {"from": str(given.folder.resolve()), "kind": given.kind, "step": step}
        (temporary / "convert.json").write_text(json.dumps(facts, indent=1) + "\n")
    command = ["dtune", "train", f"run_dir={out}", "resume=auto", *implied, *settings]
    return f"checkpoint of step {step} in {out}; to go on: {shlex.join(command)}"


def _implied(given: Given, settings: Sequence[str]) -> list[str]:
    """Settings that follow from what is converted, before those of the user."""
    keys = {setting.partition("=")[0].lstrip("+") for setting in settings}
    names_model = bool(keys & {"model", "model.path", "experiment"})
    names_method = bool(keys & {"peft", "experiment"})
    folder = given.folder.resolve()
    if given.kind == "adapter":
        files = read_adapter(str(folder), key="from")
        implied = [] if names_model or not files.base else [f"model.path={files.base}"]
        if not names_method:
            implied += _method_of(files.config)
        return [*implied, f"peft.init_from={folder}"]
    if given.kind == "model":
        if names_model:
            return [f"peft.init_from={folder}"]
        return [f"model.path={folder}", *([] if names_method else ["peft=full"])]
    return []


def _method_of(config: object) -> list[str]:
    """The method that a config of peft means; nothing for one that is not a LoRA."""
    assert isinstance(config, dict)
    if config.get("peft_type") != "LORA":
        raise ConfigError(
            f"from: the adapter is of type {config.get('peft_type')}; choose its method and its "
            "settings with peft=..."
        )
    name = "rslora" if config.get("use_rslora") else "dora" if config.get("use_dora") else "lora"
    targets = config.get("target_modules")
    named = targets if isinstance(targets, list) else [targets]
    return [
        f"peft={name}",
        f"peft.rank={config['r']}",
        f"peft.alpha={config['lora_alpha']}",
        f"peft.dropout={config.get('lora_dropout', 0.0)}",
        # peft keeps a set, whose order is another each time.
        f"peft.targets=[{','.join(sorted(map(str, named)))}]",
    ]
