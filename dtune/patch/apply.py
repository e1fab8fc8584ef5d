"""Applies patches to a built model and says what was replaced."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dtune.errors import ConfigError
from dtune.patch.schema import KernelsConfig
from dtune.types import ModelSpec


@dataclass(frozen=True)
class PatchRow:
    """One patch: which modules it replaced, by what, and how often."""

    patch: str
    modules: str
    before: str
    after: str
    count: int


def apply_patches(model: nn.Module, config: KernelsConfig, spec: ModelSpec) -> list[PatchRow]:
    """Replace modules in place as ``kernels.patches`` lists; a row for each patch.

    Raises ConfigError for a patch that does not exist or matches nothing in this model.
    """
    if config.patches:
        raise ConfigError(
            f"kernels.patches={config.patches}: there are no such patches for {spec.family}; "
            "use kernels=torch"
        )
    return []
