"""Which linear layers a list of targets means."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dtune.types import ModelSpec, Role

ALL_LINEAR = "all-linear"


def plan_targets(model: nn.Module, spec: ModelSpec, targets: Sequence[str]) -> list[str]:
    """Dotted paths of the linear layers that the targets name, in module order.

    A target is a role (``all-linear``: every linear of the blocks; ``attention``, ``mlp``,
    ``head``), the last component of a path (``q_proj``), or a glob over whole paths
    (``model.layers.*.mlp.*``). Raises ConfigError for a target that matches nothing.
    """
    roles = plan_roles(model, spec)
    chosen: set[str] = set()
    for target in targets:
        found = roles[target] if target in roles else spec.linears_named(target)
        if not found:
            raise spec.no_linear_error("peft.targets", target, list(roles))
        chosen.update(found)
    return [path for path in spec.linears if path in chosen]


def plan_roles(model: nn.Module, spec: ModelSpec) -> dict[str, list[str]]:
    """Paths of the linear layers of every role that the model has."""
    blocks = [f"{name}." for name, module in model.named_modules() if _is_block(module, spec)]
    in_blocks = [path for path in spec.linears if path.startswith(tuple(blocks))]
    roles = {ALL_LINEAR: in_blocks}
    for role in (Role.attention, Role.mlp, Role.head):
        roles[role.value] = [path for path, own in spec.linears.items() if own is role]
    return {name: paths for name, paths in roles.items() if paths}


def _is_block(module: nn.Module, spec: ModelSpec) -> bool:
    return isinstance(module, tuple(spec.block_types))
