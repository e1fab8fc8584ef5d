"""``launch=slurm_srun``: a Slurm job of one task a process, without torchrun."""

from __future__ import annotations

from dataclasses import dataclass

from dtune_launch.schema.slurm import SlurmConfig


@dataclass
class SlurmSrunConfig(SlurmConfig):
    """A Slurm job with one task a GPU, each a rank; nothing restarts a rank inside the job."""

    name: str = "slurm_srun"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_restarts:
            raise ValueError(
                f"launch.max_restarts={self.max_restarts} needs torchrun's agent, which "
                "launch=slurm_srun does without; use launch=slurm"
            )

    @property
    def has_agent(self) -> bool:
        """Whether a task is torchrun's agent of a node; else it is a rank."""
        return False
