"""How far backward goes: blocks below all that is trained only compute forward."""

from __future__ import annotations

from math import prod

from dtune.build import BuiltModel
from dtune.peft.base import is_norm
from dtune.train.speed import flops_model


def unreached_flops(built: BuiltModel, length: float) -> float:
    """FLOPs a token of a backward pass that does not happen, which the formula of MFU counts.

    For a token of a document of ``length`` tokens: in each block that backward does not reach, two
    a parameter and those of attention's gradients. The model is one that no engine has yet.
    """
    blocks = unreached_blocks(built)
    within = tuple(f"{path}." for path in blocks)
    parameters = sum(prod(s) for name, s in built.frozen.items() if name.startswith(within))
    width = flops_model(built.matrices, built.spec).hidden
    return 2.0 * parameters + 4.0 * len(blocks) * width * length


def unreached_blocks(built: BuiltModel) -> list[str]:
    """Paths of the first blocks, where nothing is trained in them or before them.

    Outside of the blocks only the head and norms are known to come after them.
    """
    model, types = built.model, built.spec.block_types
    blocks = [path for path, module in model.named_modules() if isinstance(module, types)]
    head = model.get_output_embeddings()
    after = {id(p) for m in model.modules() if is_norm(m) or m is head for p in m.parameters()}
    before = {id(p) for p in model.get_input_embeddings().parameters()}
    lowest = len(blocks)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        owner = next((at for at, path in enumerate(blocks) if name.startswith(f"{path}.")), None)
        if owner is not None:
            lowest = min(lowest, owner)
        elif id(parameter) not in after or id(parameter) in before:
            return []
    return blocks[:lowest]
