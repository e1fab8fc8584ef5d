"""AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from dtune.errors import ConfigError
from dtune.optim.schema import OPTIM, OptimConfig, same_rate

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


@dataclass
class AdamConfig(OptimConfig):
    """Adam with decoupled weight decay, Loshchilov & Hutter 2017, arXiv:1711.05101."""

    # Decay of the first moment.
    beta1: float = 0.9
    # Decay of the second moment.
    beta2: float = 0.999
    # Added to the denominator.
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"optim.{key}={value} must be in [0, 1)")
        if not self.eps > 0.0:
            raise ConfigError(f"optim.eps={self.eps} must be above 0")


class Flat(Enum):
    """Whether what is trained lies in one buffer."""

    auto = "auto"
    always = "always"
    never = "never"


@OPTIM.register
@dataclass
class AdamwConfig(AdamConfig):
    """AdamW: torch's, fused where the device has it, or ours over one buffer."""

    name: str = "adamw"
    # All parameters in one buffer: auto (on a GPU, up to 1 GiB, whole on each rank), always, never.
    flat: Flat = Flat.auto

    @property
    def state_bytes(self) -> int:
        """Two fp32 moments."""
        return 8

    def alignment(self, size: int, *, on_gpu: bool) -> int:
        """Where one buffer holds all parameters, what each begins at a multiple of."""
        from dtune.optim.optimizers import flat_alignment

        return flat_alignment(self.flat, size, on_gpu=on_gpu)

    def build(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        rate_factor: Callable[[str], float] = same_rate,
        whole: bool | None = None,
    ) -> Optimizer:
        """Import and construct the optimizer over the named trainable parameters."""
        from dtune.optim.optimizers import build_adamw

        return build_adamw(self, named, rate_factor, whole=whole)


@OPTIM.register
@dataclass
class Adamw8bitConfig(AdamConfig):
    """AdamW with 8-bit block-wise state, Dettmers et al. 2021, arXiv:2110.02861 (bitsandbytes)."""

    name: str = "adamw8bit"

    @property
    def state_bytes(self) -> int:
        """Two moments of 8 bits; their block scales are below 2 %."""
        return 2

    def state_of(self, numel: int) -> int:
        """Two moments, each with an fp32 scale a block of 256; small tensors keep fp32."""
        if numel < 4096:
            return 8 * numel
        return 2 * (numel + 4 * -(-numel // 256))

    def build(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        rate_factor: Callable[[str], float] = same_rate,
        whole: bool | None = None,
    ) -> Optimizer:
        """Import and construct the optimizer over the named trainable parameters."""
        from dtune.optim.optimizers import build_adamw8bit

        return build_adamw8bit(self, named, rate_factor)
