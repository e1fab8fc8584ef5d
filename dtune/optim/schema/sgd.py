"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.errors import ConfigError
from dtune.optim.schema import OPTIM, OptimConfig, same_rate

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


@OPTIM.register
@dataclass
class SgdConfig(OptimConfig):
    """SGD of torch, with momentum."""

    name: str = "sgd"
    # Share of the last update that is kept.
    momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.momentum < 1.0:
            raise ConfigError(f"optim.momentum={self.momentum} must be in [0, 1)")

    @property
    def state_bytes(self) -> int:
        """One fp32 momentum, where there is any."""
        return 4 if self.momentum else 0

    def stepping(self, numel: int, *, decays: bool) -> int:
        """Decayed parameters are added to a copy of the gradients, all of a group at once."""
        return 4 * numel if decays else 0

    def build(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        rate_factor: Callable[[str], float] = same_rate,
        whole: bool | None = None,
    ) -> Optimizer:
        """Import and construct the optimizer over the named trainable parameters."""
        from dtune.optim.optimizers import build_sgd

        return build_sgd(self, named, rate_factor)
