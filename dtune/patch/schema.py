"""Config of the kernels that are put into the model."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class KernelsConfig:
    """Which patches replace modules of the built model."""

    name: str = "torch"
    # Patches to apply, by name; none: every module computes in plain PyTorch.
    patches: list[str] = field(default_factory=list)
