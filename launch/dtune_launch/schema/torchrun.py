"""``launch=torchrun``: torchrun on this machine, and on others where the same is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from dtune_launch.disks import check_shared
from dtune_launch.local import describe_torchrun, run_torchrun
from dtune_launch.network import address_towards, check_port_free, split_head
from dtune_launch.spec import JobSpec, LaunchConfig


@dataclass
class TorchrunConfig(LaunchConfig):
    """torchrun on this machine, or on several: the same command on each, with its own node_rank."""

    name: str = "torchrun"
    # Machines; dtune is called on each of them, with the same run_dir on a disk that all see.
    nnodes: int = 1
    # Which of them this one is; number 0 is the head, which makes the run folder.
    node_rank: int = 0
    # host:port of the head, with a free port; needed for several machines.
    head: str = ""
    # The disk of run_dir is seen by all machines, whatever it looks like from here.
    shared_disk: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nnodes < 1:
            raise ValueError(f"launch.nnodes={self.nnodes} must be at least 1")
        if not 0 <= self.node_rank < self.nnodes:
            raise ValueError(
                f"launch.node_rank={self.node_rank} must be 0 to {self.nnodes - 1}, one number "
                f"for each of launch.nnodes={self.nnodes} machines"
            )
        if self.head and self.nnodes == 1:
            raise ValueError(
                f"launch.head={self.head} is for several machines, and launch.nnodes=1; set "
                "launch.nnodes, or leave launch.head out"
            )
        if self.head:
            split_head(self.head)
        elif self.nnodes > 1:
            raise ValueError(
                f"launch.nnodes={self.nnodes} needs launch.head=HOST:PORT, the address of the "
                "machine with launch.node_rank=0 and a free port on it"
            )

    @property
    def num_nodes(self) -> int:
        """Machines that the run is spread over."""
        return self.nnodes

    @property
    def writes_folder(self) -> bool:
        """Whether the launching process makes the run folder: that of the head does."""
        return self.node_rank == 0

    def check(self, run_dir: Path) -> list[str]:
        """Refuse a head that cannot be, and a folder that other machines cannot see."""
        if self.nnodes == 1:
            return []
        address_towards(self.head)
        if self.node_rank == 0:
            check_port_free(self.head)
        return [] if self.shared_disk else check_shared(run_dir, nodes=self.nnodes)

    def describe(self, job: JobSpec) -> str:
        """The job as a shell would take it."""
        return describe_torchrun(self._placed(job))

    def start(
        self,
        job: JobSpec,
        in_process: Callable[[list[str]], int],
        is_stopped: Callable[[], bool],
    ) -> int:
        """Run this machine's part of the job to its end."""
        return run_torchrun(self._placed(job), is_stopped)

    def _placed(self, job: JobSpec) -> JobSpec:
        if self.nnodes == 1:
            return job
        return replace(
            job,
            nodes=self.nnodes,
            node_rank=self.node_rank,
            head=self.head,
            local_addr=address_towards(self.head),
        )
