"""Training of some of the base's own parameters: the last blocks, or what patterns name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from dtune.errors import ConfigError
from dtune.peft.base import is_norm
from dtune.peft.schema.freeze import FreezeConfig
from dtune.peft.targets import plan_roles
from dtune.peft.whole import WholeModel
from dtune.types import ModelSpec


class Freeze(WholeModel):
    """The last blocks and what else the config names are trained; all else is frozen."""

    name = "freeze"

    def __init__(self, config: FreezeConfig) -> None:
        self.config = config

    def plan_trained(self, model: nn.Module, spec: ModelSpec) -> frozenset[str]:
        """Names of all that is chosen.

        ConfigError for a pattern that matches nothing, more blocks than there are, a part that
        the model lacks, and one name of a shared parameter without the others.
        """
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        chosen = _below(self._last_blocks(model, spec), names)
        chosen |= self._parts(model, spec, names)
        roles = {role: _below(paths, names) for role, paths in plan_roles(model, spec).items()}
        for pattern in self.config.patterns:
            found = roles[pattern] if pattern in roles else _matching(pattern, names)
            if not found:
                raise _unmatched(pattern, roles, names, spec)
            chosen |= found
        _check_shared(chosen, spec)
        return frozenset(chosen - spec.tied.keys())

    def _last_blocks(self, model: nn.Module, spec: ModelSpec) -> list[str]:
        count = self.config.num_blocks
        blocks = _blocks(model, spec)
        if count > len(blocks):
            raise ConfigError(
                f"peft.last_blocks={count}: {spec.family} ({spec.path}) has {len(blocks)} blocks; "
                f"set it to at most {len(blocks)}"
            )
        return blocks[len(blocks) - count :]

    def _parts(self, model: nn.Module, spec: ModelSpec, names: list[str]) -> set[str]:
        """Parameters of embeddings, head and outer norms, where they are asked for."""
        config = self.config
        in_blocks = tuple(f"{block}." for block in _blocks(model, spec))
        outside = {
            path: module
            for path, module in model.named_modules()
            if not f"{path}.".startswith(in_blocks)
        }
        parts = {
            "embeddings": [p for p, module in outside.items() if isinstance(module, nn.Embedding)],
            "head": plan_roles(model, spec).get("head", []),
            "final_norm": [p for p, module in outside.items() if is_norm(module)],
        }
        asked = {
            "embeddings": config.embeddings,
            "head": config.head,
            "final_norm": config.final_norm,
        }
        chosen: set[str] = set()
        for part, paths in parts.items():
            found = _below(paths, names) if asked[part] else set()
            if asked[part] and not found:
                raise ConfigError(
                    f"peft.{part}=true: {spec.family} ({spec.path}) has no such parameters; set "
                    f"peft.{part}=false, or name them in peft.patterns"
                )
            chosen |= found
        return chosen


def _blocks(model: nn.Module, spec: ModelSpec) -> list[str]:
    """Paths of the blocks, in order."""
    return [p for p, module in model.named_modules() if isinstance(module, spec.block_types)]


def _below(paths: Iterable[str], names: Iterable[str]) -> set[str]:
    prefixes = tuple(f"{path}." for path in paths)
    return {name for name in names if name.startswith(prefixes)}


def _matching(pattern: str, names: Iterable[str]) -> set[str]:
    """A pattern with a dot is about names from their start, another about one component."""
    if "." in pattern:
        return {n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")}
    return {n for n in names if any(fnmatchcase(part, pattern) for part in n.split("."))}


def _check_shared(chosen: set[str], spec: ModelSpec) -> None:
    for alias, name in spec.tied.items():
        if (alias in chosen) is not (name in chosen):
            one, other = (alias, name) if alias in chosen else (name, alias)
            raise ConfigError(
                f"peft=freeze: {one} is to be trained, and {other} is the same parameter in "
                f"{spec.family} ({spec.path}); choose both (peft.embeddings=true with "
                "peft.head=true, or by peft.patterns), or neither"
            )


def _unmatched(
    pattern: str, roles: Mapping[str, set[str]], names: list[str], spec: ModelSpec
) -> ConfigError:
    parts = {part for name in names for part in name.split(".") if not part.isdecimal()}
    paths = [*names, *(name.rpartition(".")[0] for name in names)] if "." in pattern else []
    pool = dict.fromkeys([*roles, *sorted(parts), *paths])
    near = difflib.get_close_matches(pattern, pool, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return ConfigError(
        f"peft.patterns: {pattern!r} matches no parameter of {spec.family} ({spec.path}); {hint}"
        f"Roles: {', '.join(roles)}. Components: {', '.join(sorted(parts))}"
    )
