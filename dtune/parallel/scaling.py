"""Loss scaling for fp16."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class LossScale:
    """Dynamic loss scale, Micikevicius et al. 2017, arXiv:1710.03740.

    Halves after an overflow, doubles after ``growth_interval`` steps without one.
    """

    def __init__(self, value: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.value = value
        self._growth_interval = growth_interval
        self._good_steps = 0

    def accepts(self, norm: torch.Tensor) -> bool:
        """Whether the gradients of this norm are finite; adapts the scale. Waits for the device."""
        if not bool(torch.isfinite(norm)):
            self.value = max(self.value / 2.0, 1.0)
            self._good_steps = 0
            return False
        self._good_steps += 1
        if self._good_steps == self._growth_interval:
            self.value *= 2.0
            self._good_steps = 0
        return True

    def state(self) -> dict[str, float | int]:
        """Scalars to save."""
        return {"loss_scale": self.value, "loss_scale_good_steps": self._good_steps}

    def load(self, scalars: Mapping[str, float | int]) -> None:
        """Take over saved scalars."""
        self.value = float(scalars["loss_scale"])
        self._good_steps = int(scalars["loss_scale_good_steps"])
