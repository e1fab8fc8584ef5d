"""What a launcher is asked for: the launch group of the config, and the job made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

AUTO = "auto"


@dataclass
class LaunchConfig:
    """How a run becomes processes."""

    name: str = "local"
    # Processes on this machine; auto: 1 for parallel=single, else one per GPU (2 without a GPU).
    nproc: int | str = AUTO
    # Times that all processes start again from the last checkpoint after one of them died.
    max_restarts: int = 0
    # Print the command and its environment instead of running it.
    dry_run: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.nproc, str) and self.nproc != AUTO:
            raise ValueError(f"launch.nproc={self.nproc} must be auto or a number of processes")
        if isinstance(self.nproc, int) and self.nproc < 1:
            raise ValueError(f"launch.nproc={self.nproc} must be at least 1, or auto")
        if self.max_restarts < 0:
            raise ValueError(f"launch.max_restarts={self.max_restarts} must be 0 or more")


@dataclass(frozen=True)
class JobSpec:
    """Processes to start on this machine: ``python -m <module> <arguments>``, nproc times."""

    module: str
    arguments: tuple[str, ...]
    run_dir: Path
    nproc: int = 1
    max_restarts: int = 0
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables beyond those of this process."""
