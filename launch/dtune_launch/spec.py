"""What a launcher is asked for: the launch group of the config, and the job made from it.

A wrong setting is a ValueError whose text names the key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

AUTO = "auto"


class LaunchError(ValueError):
    """A job cannot be started from here, or was not taken: says why, and which key to turn."""


@dataclass
class LaunchConfig:
    """How a run becomes processes."""

    name: str = "???"
    # Processes on a node, a number; auto: one per GPU (local: 1 for parallel=single, 2 if no GPU).
    nproc: str = AUTO
    # Times that all processes start again from the last checkpoint after one of them died.
    max_restarts: int = 0
    # Print what would be run, with its environment, instead of running it.
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.nproc != AUTO:
            if not self.nproc.lstrip("-").isdecimal():
                raise ValueError(f"launch.nproc={self.nproc} must be auto or a number of processes")
            if int(self.nproc) < 1:
                raise ValueError(f"launch.nproc={self.nproc} must be at least 1, or auto")
        if self.max_restarts < 0:
            raise ValueError(f"launch.max_restarts={self.max_restarts} must be 0 or more")

    @property
    def num_nodes(self) -> int:
        """Machines that the run is spread over."""
        return 1

    @property
    def gpus_of_node(self) -> int | None:
        """GPUs of a node; None where it is this machine, whose GPUs can be counted."""
        return None

    @property
    def writes_folder(self) -> bool:
        """Whether the launching process makes the run folder."""
        return True

    def check(self, run_dir: Path) -> list[str]:
        """Refuse by LaunchError what could not be started from here; warnings about the rest."""
        return []

    def describe(self, job: JobSpec) -> str:
        """The job as a shell would take it, for ``launch.dry_run``."""
        raise NotImplementedError(type(self))

    def try_submission(self, job: JobSpec) -> None:
        """Ask whether the job would be taken, before its run folder is made; LaunchError if not."""

    def start(
        self,
        job: JobSpec,
        in_process: Callable[[list[str]], int],
        is_stopped: Callable[[], bool],
    ) -> int | None:
        """Start the job; the exit code of its end, or None where it is not waited for.

        ``in_process`` runs the job's arguments as its only rank, in this process. ``is_stopped``
        says whether a signal came before: then no process is started here. The exit code
        says only that something went wrong; ``RUN/status.json`` says what. LaunchError where
        the job is not taken.
        """
        raise NotImplementedError(type(self))


@dataclass(frozen=True)
class JobSpec:
    """Processes to start: ``python -m <module> <arguments>``, nproc times on each node."""

    module: str
    arguments: tuple[str, ...]
    run_dir: Path
    nproc: int = 1
    max_restarts: int = 0
    save_seconds: float = 1800.0
    """Longest that a save may give no sign of life, ``watch.save``; 0: for ever."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables beyond those of this process."""
    nodes: int = 1
    node_rank: int = 0
    """Which of the nodes this machine is; the first is where the ranks meet."""
    head: str = "127.0.0.1:0"
    """Address of the first node, and a port that is free on it; port 0 takes one, on one node."""
    local_addr: str = "127.0.0.1"
    """Address by which the other nodes reach this one."""
