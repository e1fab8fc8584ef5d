"""Universal checkpoints of DeepSpeed, read without running what is in them.

DeepSpeed's ``ds_to_universal`` writes ``zero/<parameter>/fp32.pt``, ``exp_avg.pt`` and
``exp_avg_sq.pt``, each a pickled tensor (flat after ZeRO 3), and keeps ``*model_states.pt``, which
tell the steps done and the shapes. All of them are pickles: they are read by torch's restricted
unpickler alone, and a file that asks for anything else than tensors and plain values is refused.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dtune.errors import ConfigError

ZERO = "zero"
LATEST_UNIVERSAL = "latest_universal"
MASTER = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")

# Parts of a name that wrappers put in: torch's and DeepSpeed's, peft's, and its adapter's name.
_PREFIXES = ("module.", "base_model.model.")
_ADAPTER = ".default"
_FACTOR = ".lora_"


@dataclass(frozen=True)
class UniversalCheckpoint:
    """A folder that was found to hold what it must; no tensor has been read."""

    path: Path
    folders: Mapping[str, Path]
    """Folder of each parameter that has optimizer state, by ``plain_name``."""
    shapes: Mapping[str, tuple[int, ...]]
    """By ``plain_name``, as far as the checkpoint tells."""
    steps: int
    """Optimizer steps done, with those that fp16 has skipped."""
    skipped: int
    samples: int
    """Sequences that the steps took, as DeepSpeed counts them; 0 where it does not say."""

    def read(self, name: str, key: str, shape: tuple[int, ...]) -> torch.Tensor:
        """One tensor of a parameter, flat, fp32, mapped from its file. ConfigError if not so."""
        path = self.folders[name] / f"{key}.pt"
        if not path.is_file():
            raise ConfigError(f"{path} is missing: the checkpoint is incomplete")
        values = _load(path)
        if isinstance(values, dict):
            values = values.get("param")
        if not isinstance(values, torch.Tensor):
            raise ConfigError(f"{path} holds no tensor")
        told = tuple(values.shape) if values.ndim > 1 else self.shapes.get(name, shape)
        if told != shape or values.numel() != math.prod(shape):
            raise ConfigError(
                f"{path} has shape {list(values.shape if values.ndim > 1 else told)} and "
                f"{values.numel()} elements, the run's model wants {list(shape)}: set model.path "
                "and peft as they were"
            )
        return values.detach().reshape(-1).float()


def plain_name(name: str) -> str:
    """A parameter's name without what wraps the model: the same for dtune's and for peft's.

    ``base_model.model.layers.0.q_proj.lora_A.default.weight`` becomes ``layers.0.q_proj.lora_A``.
    """
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    name = f"{name}.".replace(f"{_ADAPTER}.", ".").removesuffix(".")
    head, factor, leaf = name.rpartition(_FACTOR)
    return f"{head}{factor}{leaf.removesuffix('.weight')}" if factor else name


def open_universal(path: Path, *, steps: int = -1) -> UniversalCheckpoint:
    """Find out what a universal checkpoint holds; ``steps`` where it cannot tell that itself.

    ``path`` is the folder with ``zero/`` in it, or the one with ``latest_universal``. Raises
    ConfigError where it is not whole, or holds a pickle of anything but plain values.
    """
    folder = _tag_folder(path)
    zero = folder / ZERO
    if not zero.is_dir():
        raise ConfigError(f"{folder} has no {ZERO}/: it is no universal checkpoint of DeepSpeed")
    found = sorted(one for one in zero.iterdir() if one.is_dir())
    # What has a master alone was not trained.
    folders = {
        plain_name(one.name): one
        for one in found
        if any((one / f"{key}.pt").is_file() for key in MOMENTS)
    }
    if not folders:
        raise ConfigError(
            f"{zero} has no parameter with {' and '.join(MOMENTS)}: dtune reads what Adam has saved"
        )
    facts = _facts(folder, steps)
    return UniversalCheckpoint(folder, folders, **facts)


def _tag_folder(path: Path) -> Path:
    latest = path / LATEST_UNIVERSAL
    if (path / ZERO).is_dir() or not latest.is_file():
        return path
    name = latest.read_text(encoding="utf-8").strip()
    if not name or Path(name).name != name or name == "..":
        raise ConfigError(f"{latest} names {name!r}, which is no folder beside it")
    return path / name


def _facts(folder: Path, steps: int) -> dict[str, Any]:
    """Steps, skipped steps, samples and shapes, by the files of the module's state."""
    files = sorted(folder.glob("*model_states.pt"))
    if steps >= 0:
        return {"steps": steps, "skipped": 0, "samples": 0, "shapes": {}}
    if not files:
        raise ConfigError(
            f"{folder} has no *model_states.pt, which tells the steps done; give them with step=N"
        )
    state = _load(files[0], advice="; to read the rest without it, give the steps done with step=N")
    if not isinstance(state, dict) or not isinstance(state.get("global_steps"), int):
        raise ConfigError(f"{files[0]} does not tell global_steps; give them with step=N")
    return {
        "steps": state["global_steps"],
        "skipped": _count(state.get("skipped_steps")),
        "samples": _count(state.get("global_samples")),
        "shapes": {
            plain_name(str(name)): tuple(int(size) for size in shape)
            for group in state.get("param_shapes") or []
            for name, shape in group.items()
        },
    }


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _load(path: Path, *, advice: str = "") -> Any:
    """What a pickle holds, mapped into memory. ConfigError for code in it, or for damage."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        asked = str(error).partition("GLOBAL ")[2].split(" ", 1)[0] or "what is no tensor"
        raise ConfigError(
            f"{path} is a pickle that asks for {asked}; dtune reads tensors and plain values only, "
            f"because a pickle may run any code{advice}"
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, AttributeError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path} cannot be read as a file of torch.save: {why}") from error
