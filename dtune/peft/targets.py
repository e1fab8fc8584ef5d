"""Which linear layers a list of targets means."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence

from torch import nn

from dtune.errors import ConfigError
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
        found = roles[target] if target in roles else _matching(target, spec)
        if not found:
            raise _unmatched(target, roles, spec)
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


def _matching(target: str, spec: ModelSpec) -> list[str]:
    return [
        path
        for path in spec.linears
        if path.rpartition(".")[2] == target or fnmatch.fnmatchcase(path, target)
    ]


def _unmatched(target: str, roles: dict[str, list[str]], spec: ModelSpec) -> ConfigError:
    leaves = sorted({path.rpartition(".")[2] for path in spec.linears})
    pool = [*roles, *leaves, *(spec.linears if "." in target else ())]
    near = difflib.get_close_matches(target, pool, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return ConfigError(
        f"peft.targets: {target!r} matches no linear layer of {spec.family} ({spec.path}); {hint}"
        f"Roles: {', '.join(roles)}. Names: {', '.join(leaves)}"
    )
