"""Short runs of the embedded model whose weights the commands use, and peft adapters beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from dtune.cli import main
from dtune.resources import resolve_path
from tests.integration.train_runs import held_out, settings

BASE = resolve_path("dtune://tiny")


def train_run(folder: Path, *more: str) -> Path:
    """A run that has ended, in ``folder/run``, whose weights differ clearly from the base."""
    argv = settings(folder / "run", held_out(folder, rows=4), "train.max_steps=8", "optim.lr=1e-2")
    assert main(["train", *argv, *more]) == 0
    return folder / "run"


def base_model(dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype).eval()


def save_adapter(folder: Path, config: peft.PeftConfig, *, seed: int = 0, size: float = 0.3) -> Any:
    """Write a random adapter of the embedded model by peft; the model with it."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(base_model(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    model.peft_config["default"].base_model_name_or_path = BASE
    model.save_pretrained(str(folder))
    return model.eval()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
