"""Config of what is done about a loss or gradient that is not finite, or a spike. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dtune.errors import ConfigError


class Policy(Enum):
    """What is done about a bad step; in every case its optimizer step is not taken."""

    stop = "stop"
    skip = "skip"
    rollback = "rollback"


class SpikePolicy(Enum):
    """What is done about a spike; ``ignore`` does not look for any."""

    ignore = "ignore"
    stop = "stop"
    skip = "skip"
    rollback = "rollback"


@dataclass
class GuardConfig:
    """What is done about a bad step, decided alike on all ranks before the optimizer step."""

    name: str = "stop"
    # Loss or gradient norm is NaN or infinite: stop the run, skip the optimizer step, or rollback
    # to the last checkpoint and leave the step out.
    nonfinite: Policy = Policy.stop
    # Loss or gradient norm jumps far above what it was: ignore, stop, skip or rollback.
    spike: SpikePolicy = SpikePolicy.ignore
    # A spike is this many standard deviations above the mean of the window.
    spike_sigma: float = 6.0
    # Last good steps that spikes are measured against; none is found before half of them are done.
    spike_window: int = 128
    # Skipped steps in a row after which the run stops.
    max_skips_in_a_row: int = 4
    # Skipped steps in all after which the run stops.
    max_skips: int = 100
    # Rollbacks after which the run stops.
    max_rollbacks: int = 3
    # Steps that a rollback leaves out: the bad one and those just before it.
    leave_out: int = 1

    def __post_init__(self) -> None:
        if self.spike_sigma <= 0:
            raise ConfigError(f"guard.spike_sigma={self.spike_sigma} must be above 0")
        if self.spike_window < 4:
            raise ConfigError(
                f"guard.spike_window={self.spike_window} must be at least 4; a spread of fewer "
                "steps says nothing"
            )
        for key in ("max_skips_in_a_row", "max_skips", "max_rollbacks", "leave_out"):
            value = vars(self)[key]
            if value < 1:
                raise ConfigError(f"guard.{key}={value} must be at least 1")

    @property
    def rolls_back(self) -> bool:
        """Whether the run may have to go back to a checkpoint."""
        return self.nonfinite is Policy.rollback or self.spike is SpikePolicy.rollback
