"""``dtune convert``: between checkpoints, Hugging Face's layout and DeepSpeed's universal one."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from dtune.commands.own import Command, split_settings
from dtune.errors import CheckpointError, ConfigError


@dataclass
class ConvertSettings:
    """Settings of ``dtune convert``."""

    # What is read: a run or one step of it, an adapter, a model, or a universal checkpoint.
    from_: str = ""
    # Folder that is written; it must not exist, or be empty.
    to: str = ""
    # Which step of a run: last, or best by checkpoint.best.
    export: str = ""
    # Optimizer steps done, for a universal checkpoint that does not tell them; -1: as it tells.
    step: int = -1

    def __post_init__(self) -> None:
        for key, value in (("from", self.from_), ("to", self.to)):
            if not value:
                raise ConfigError(f"{key} names a folder: dtune convert from=PATH to=PATH")
        if self.export not in ("", "last", "best"):
            raise ConfigError(f"export={self.export} is not one of last, best")
        if self.step < -1:
            raise ConfigError(f"step={self.step} must be 0 or more")


COMMAND = Command(
    name="dtune convert",
    usage="""dtune convert from=RUN to=FOLDER: a checkpoint of a run as an adapter in PEFT's layout,
or as a model in Hugging Face's. from=RUN/checkpoints/step-N takes that step.
dtune convert from=ADAPTER to=RUN [settings of a run]: the start of a run, to go on from.
dtune convert from=MODEL to=RUN [settings of a run]: the same of a whole model.
dtune convert from=UNIVERSAL to=RUN [settings of a run]: a universal checkpoint of DeepSpeed with
its optimizer state, to go on from under any engine.""",
    own=ConvertSettings,
    unused=frozenset({"launch"}),
    why_unused="runs in one process",
    examples="""To go on: dtune train run_dir=RUN resume=auto, with the same settings. An adapter or
model needs no conversion to start from: peft.init_from=ADAPTER, model.path=MODEL.""",
)

_STEP = re.compile(r"step-\d{8,}")


class Kind(Enum):
    """What a folder holds."""

    step = "a step of a run"
    run = "a run"
    adapter = "an adapter"
    model = "a model"
    universal = "a universal checkpoint"


def run(argv: list[str]) -> int:
    """Look at what is read, and write the other."""
    if COMMAND.asks_help(argv):
        sys.stdout.write(COMMAND.help().replace("from_=", "from= "))
        return 0
    spelled = [re.sub(r"^from=", "from_=", argument) for argument in argv]
    own, settings = split_settings(spelled, ConvertSettings, COMMAND)
    source, out = Path(own.from_).expanduser(), Path(own.to).expanduser()
    kind = find_kind(source)
    _check(own, kind, settings)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"to={own.to} exists and is not empty; name another folder")
    try:
        if kind in (Kind.step, Kind.run):
            from dtune.commands.convert_from_run import export_step

            said = export_step(source, kind is Kind.run, own.export or "last", out, settings)
        else:
            from dtune.commands.convert_to_run import Given, start_run

            given = Given(source, kind.name, own.step)
            said = start_run(given, out, settings)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    sys.stdout.write(said + "\n")
    return 0


def _check(own: ConvertSettings, kind: Kind, settings: Sequence[str]) -> None:
    if own.export and kind is not Kind.run:
        raise ConfigError(f"export={own.export} chooses a step of a run, and from is {kind.value}")
    if own.step >= 0 and kind is not Kind.universal:
        raise ConfigError(
            f"step={own.step} is for universal checkpoints of DeepSpeed, and from is {kind.value}"
        )
    given = [setting.partition("=")[0].lstrip("+") for setting in settings]
    for key in ("run_dir", "resume"):
        if key in given:
            raise ConfigError(f"{key}: dtune convert reads from=PATH and writes to=PATH only")


def find_kind(folder: Path) -> Kind:
    """What a folder holds, by the names in it. ConfigError where that is nothing to convert."""
    if not folder.exists():
        raise ConfigError(f"from={folder}: there is no such folder")
    if not folder.is_dir():
        raise ConfigError(f"from={folder} is a file; name the folder that it lies in")
    names = {path.name for path in folder.iterdir()}
    if _STEP.fullmatch(folder.name):
        return Kind.step
    if "checkpoints" in names or any(_STEP.fullmatch(name) for name in names):
        return Kind.run
    if "adapter_config.json" in names:
        return Kind.adapter
    if "config.json" in names:
        if not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
            raise ConfigError(f"from={folder} has a config.json and no weights as safetensors")
        return Kind.model
    if "zero" in names or "latest_universal" in names:
        return Kind.universal
    raise ConfigError(f"from={folder} {_why_nothing(names)}")


def _why_nothing(names: set[str]) -> str:
    if "latest" in names or any(name.endswith("_optim_states.pt") for name in names):
        return (
            "is a checkpoint of DeepSpeed as its ranks have written it; make it universal first: "
            "python -m deepspeed.checkpoint.ds_to_universal --input_folder STEP --output_folder "
            "STEP_universal"
        )
    if "manifest.json" in names:
        return "was never published as step-...: its save did not end; take another step"
    if any(name.endswith(".distcp") for name in names):
        return "is a checkpoint of torch.distributed.checkpoint, which dtune does not read"
    return (
        "is no checkpoint: there is no run (checkpoints/), adapter (adapter_config.json), model "
        "(config.json) or universal checkpoint of DeepSpeed (zero/) in it"
    )
