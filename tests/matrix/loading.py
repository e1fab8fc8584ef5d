"""What a cell has exported, loaded by others' libraries on the base that it was trained against."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dtune.runtime.world import World
from tests.distributed.training import Built, Setup, build


def load_exported(world: World, built: Built, setup: Setup, folder: Path) -> nn.Module:
    """A model in evaluation mode from the exported files, by ``transformers`` and ``peft``.

    What ``peft`` has no type for is loaded by dtune, from the files alone.
    """
    if not (folder / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(folder).float().eval()
    config = json.loads((folder / "adapter_config.json").read_text())
    if config["peft_type"] not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        return load_by_dtune(world, setup, folder)
    base = AutoModelForCausalLM.from_pretrained(setup.model).float()
    put_base(base, built)
    return peft.PeftModel.from_pretrained(base, folder).eval()


def put_base(base: nn.Module, built: Built) -> None:
    """Give a model the weights that the method was trained against.

    They are those that the model held, quantised where they were, without what the method took
    out of them (PiSSA): its export is a change of the whole.
    """
    kept = built.method.base(built.stored)
    with torch.no_grad():
        for name, shape in built.frozen.items():
            count = torch.Size(shape).numel()
            whole = built.held.read(name, 0, count).float()
            taken = built.stored.read(name, 0, count).float() - kept.read(name, 0, count).float()
            base.get_parameter(built.method.stored_name(name)).copy_((whole + taken).view(shape))


def load_by_dtune(world: World, setup: Setup, folder: Path) -> nn.Module:
    """A model built anew whose adapter comes from the files."""
    loaded = build(world, setup.alone(), saved=folder)
    return loaded.engine.module.eval()
