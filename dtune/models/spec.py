"""Facts about a built model: roles of its linears, its blocks, its tied weights."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from dtune.types import ModelSpec, Role

_MLP_MARKS = ("MLP", "Mlp", "FeedForward", "Experts", "MoeBlock", "MoE")


def _role_of_class(name: str) -> Role | None:
    if "Attention" in name:
        return Role.attention
    if any(mark in name for mark in _MLP_MARKS):
        return Role.mlp
    return None


def _role(model: nn.Module, path: str, head: nn.Module | None) -> Role:
    """Role of a linear: that of the innermost module around it whose class names one."""
    if model.get_submodule(path) is head:
        return Role.head
    parent = path
    while "." in parent:
        parent = parent.rpartition(".")[0]
        role = _role_of_class(type(model.get_submodule(parent)).__name__)
        if role is not None:
            return role
    return Role.other


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


def _block_types(model: nn.Module) -> tuple[type[nn.Module], ...]:
    types = {
        type(block): None
        for blocks in _outermost_lists(model)
        for block in blocks
        if any(isinstance(part, nn.Linear) for part in block.modules())
    }
    return tuple(types)


def tied_names(model: nn.Module) -> dict[str, str]:
    """Parameter name -> the first name of the same parameter, for names that are not the first."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            tied[name] = owner
    return tied


def stored_buffers(model: nn.Module) -> tuple[str, ...]:
    """Names of the buffers that a checkpoint of the model holds."""
    state = model.state_dict().keys()
    return tuple(name for name, _ in model.named_buffers() if name in state)


def describe(model: PreTrainedModel, path: str) -> ModelSpec:
    """Return the facts about a model that was built from ``path``, as the user wrote it."""
    head = model.get_output_embeddings()
    linears = {
        name: _role(model, name, head)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    block_types = _block_types(model)
    assert block_types, f"{type(model).__name__} has no list of blocks"
    return ModelSpec(
        family=model.config.model_type,
        path=path,
        config=model.config,
        block_types=block_types,
        linears=linears,
        tied=tied_names(model),
        buffers=stored_buffers(model),
        num_parameters=sum(p.numel() for p in model.parameters()),
    )
