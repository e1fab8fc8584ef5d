"""Settings of ``dtune plan`` beside those of the run. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dtune.errors import ConfigError


class Find(Enum):
    """What ``dtune plan`` looks for."""

    nothing = "nothing"
    max_length = "max_length"
    micro_batch = "micro_batch"
    cheapest = "cheapest"


@dataclass
class PlanSettings:
    """Settings of ``dtune plan``."""

    # Largest data.max_length or train.micro_batch_size that fits, or the settings of least hours.
    find: Find = Find.nothing
    # Card of the run: h200, h100, ... (docs/plan.md); auto: of this machine, if any; none.
    card: str = "auto"
    # GPUs of the run, simulated; 0: as many as the group launch has.
    gpus: int = 0
    # GPUs of one node.
    gpus_per_node: int = 8
    # Rate of the card instead of the table's: dense bf16 in TFLOP/s; 0: the table's.
    tflops: float = 0.0
    # The same of its memory in GB.
    memory_gb: float = 0.0
    # The same of the bandwidth of its memory in TB/s.
    bandwidth_tb: float = 0.0
    # The same from a card to another of its node, one direction, in GB/s.
    link_gb: float = 0.0
    # The same from a card to other nodes, one direction, in GB/s.
    network_gb: float = 0.0

    def __post_init__(self) -> None:
        if self.gpus < 0:
            raise ConfigError(f"gpus={self.gpus} must be 0 (as the group launch has it) or more")
        if self.gpus_per_node < 1:
            raise ConfigError(f"gpus_per_node={self.gpus_per_node} must be at least 1")
        for key in ("tflops", "memory_gb", "bandwidth_tb", "link_gb", "network_gb"):
            if not 0 <= getattr(self, key) < float("inf"):
                raise ConfigError(f"{key}={getattr(self, key)} must be 0 (the table's) or above")
        if not self.card:
            raise ConfigError("card= names the card of the run; card=none predicts no times")
