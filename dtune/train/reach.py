"""How far backward goes: blocks below all that is trained only compute forward."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from dtune.peft.base import is_norm
from dtune.types import ModelSpec


def unreached_blocks(model: PreTrainedModel, spec: ModelSpec) -> list[nn.Module]:
    """The first blocks, where nothing is trained in them or before them.

    Outside of the blocks only the head and norms are known to come after them.
    """
    blocks = [module for module in model.modules() if isinstance(module, spec.block_types)]
    owners = {id(p): at for at, block in enumerate(blocks) for p in block.parameters()}
    head = model.get_output_embeddings()
    after = {id(p) for m in model.modules() if is_norm(m) or m is head for p in m.parameters()}
    before = {id(p) for p in model.get_input_embeddings().parameters()}
    lowest = len(blocks)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        owner = owners.get(id(parameter))
        if owner is not None:
            lowest = min(lowest, owner)
        elif id(parameter) not in after or id(parameter) in before:
            return []
    return blocks[:lowest]
