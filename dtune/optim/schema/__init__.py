"""Configs of the optimizers, one module each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtune.errors import ConfigError
from dtune.registry import Registry

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


def same_rate(name: str) -> float:
    """Every parameter at the learning rate of ``optim.lr``."""
    return 1.0


@dataclass
class OptimConfig:
    """Update rule of the trained parameters. Norms and biases get no weight decay."""

    name: str = "???"
    # Peak learning rate, after warm-up.
    lr: float = 1e-4
    # Decoupled weight decay of matrices.
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"optim.lr={self.lr} must be above 0")
        if self.weight_decay < 0:
            raise ConfigError(f"optim.weight_decay={self.weight_decay} must be 0 or more")

    @property
    def state_bytes(self) -> int:
        """Optimizer state of one trained parameter, in bytes."""
        raise NotImplementedError(type(self))

    def state_of(self, numel: int) -> int:
        """Optimizer state of a tensor of so many elements, in bytes."""
        return self.state_bytes * numel

    def alignment(self, size: int, *, on_gpu: bool) -> int:
        """Elements that parameters of so many bytes begin at a multiple of, in one buffer of all.

        0: each stays a tensor of its own. They and their gradients are whole.
        """
        return 0

    def stepping(self, numel: int, *, decays: bool) -> int:
        """Bytes that the update of a group takes besides what it updates and reads."""
        return 0

    def build(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        rate_factor: Callable[[str], float] = same_rate,
        whole: bool | None = None,
    ) -> Optimizer:
        """Import and construct the optimizer over the named trainable parameters.

        ``rate_factor`` multiplies ``lr``, by the parameter's name. ``whole``: whether parameters
        and gradients are whole tensors of this rank, which an optimizer may put where it likes;
        None where nothing will be trained.
        """
        raise NotImplementedError(type(self))


OPTIM: Registry[OptimConfig] = Registry("optim", OptimConfig, __name__)
