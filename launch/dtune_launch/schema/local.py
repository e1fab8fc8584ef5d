"""``launch=local``: this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dtune_launch.local import describe_job, is_one_process, run_job
from dtune_launch.spec import JobSpec, LaunchConfig


@dataclass
class LocalConfig(LaunchConfig):
    """This machine: in this process for one rank, through torchrun for several."""

    name: str = "local"

    def describe(self, job: JobSpec) -> str:
        """The job as a shell would take it."""
        return describe_job(job)

    def start(
        self,
        job: JobSpec,
        in_process: Callable[[list[str]], int],
        is_stopped: Callable[[], bool],
    ) -> int:
        """Run the job to its end."""
        if is_one_process(job):
            return in_process(list(job.arguments))
        return run_job(job, is_stopped)
