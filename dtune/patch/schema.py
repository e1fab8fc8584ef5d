"""Config of the kernels that are put into the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from dtune.errors import ConfigError


class Backend(Enum):
    """What computes the patched modules."""

    torch = "torch"
    triton = "triton"
    auto = "auto"
    reference = "reference"


@dataclass
class KernelsConfig:
    """Which patches replace modules of the built model, and what they compute with."""

    # torch: no patch, every module as it is; triton: the patches below, on a CUDA or ROCm device;
    # auto: triton where it can run, else torch; reference: the patches by the plain PyTorch
    # references of their kernels, on a CPU, to check them.
    name: Backend = Backend.torch
    # Patches to apply, by name.
    patches: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.name is Backend.torch and self.patches:
            raise ConfigError(
                f"kernels=torch applies no patches, kernels.patches={self.patches} lists some; "
                "set kernels=auto or kernels=triton"
            )
