"""``launch=slurm``: a Slurm job of one torchrun agent a node."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from dtune_launch.disks import check_shared
from dtune_launch.slurm import describe_submission, submit, try_submission
from dtune_launch.slurm_queries import check_cluster, seconds_of
from dtune_launch.spec import AUTO, JobSpec, LaunchConfig

_TIME = re.compile(r"(\d+-)?\d+:\d\d(:\d\d)?|\d+-\d+|infinite|unlimited", re.IGNORECASE)
_MEMORY = re.compile(r"\d+[KMGT]?")


@dataclass
class SlurmConfig(LaunchConfig):
    """A Slurm job with one task a node, each torchrun's agent."""

    name: str = "slurm"
    # Nodes of the job.
    nodes: int = 1
    # GPUs of each node; 0 asks for none.
    gpus_per_node: int = 1
    # Kind of GPU as the cluster names it, such as h100; empty: any.
    gpu_type: str = ""
    # Ask for GPUs by --gres=gpu:N, for clusters that do not know --gpus-per-node.
    gres: bool = False
    # CPU cores of each process; 0: what the cluster gives.
    cpus_per_process: int = 0
    # Memory of each node, such as 200G; empty: what the cluster gives; 0: all of the node.
    memory: str = ""
    # Time limit of one job, such as 4:00:00 or 1-12:00:00; empty: that of the partition.
    time: str = ""
    # Partition.
    partition: str = ""
    # Account that the job is charged to.
    account: str = ""
    # Quality of service.
    qos: str = ""
    # Features that nodes must have.
    constraint: str = ""
    # Name of the job; empty: that of the run folder.
    job_name: str = ""
    # Environment modules to load, in order.
    modules: list[str] = field(default_factory=list)
    # Lines of shell that the job begins with, after the modules; for secrets write $(cat FILE).
    setup: list[str] = field(default_factory=list)
    # Words before the command of each task, such as [apptainer,exec,--nv,/images/dtune.sif].
    wrap: list[str] = field(default_factory=list)
    # Further options of srun, such as ["--container-image=/images/dtune.sqsh"].
    srun_options: list[str] = field(default_factory=list)
    # Further options of sbatch, such as ["--exclusive","--reservation=mine"].
    sbatch_options: list[str] = field(default_factory=list)
    # Interpreter that has dtune, on the nodes or in the container; empty: the one that submits.
    python: str = ""
    # Seconds before the time limit at which the ranks save and stop: above a step and a save.
    signal_seconds: int = 180
    # Times that a job which has saved at its time limit is requeued to go on.
    max_requeues: int = 50
    # The disk of run_dir is seen by all nodes, whatever it looks like from here.
    shared_disk: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, value, least in (
            ("nodes", self.nodes, 1),
            ("gpus_per_node", self.gpus_per_node, 0),
            ("cpus_per_process", self.cpus_per_process, 0),
            ("signal_seconds", self.signal_seconds, 1),
            ("max_requeues", self.max_requeues, 0),
        ):
            if value < least:
                raise ValueError(f"launch.{key}={value} must be at least {least}")
        self._check_texts()
        if self.nproc != AUTO and 0 < self.gpus_per_node < int(self.nproc):
            raise ValueError(
                f"launch.nproc={self.nproc} is above launch.gpus_per_node={self.gpus_per_node}; "
                "each process needs a GPU of its own: leave launch.nproc out"
            )

    def _check_texts(self) -> None:
        if self.time and not _TIME.fullmatch(self.time):
            # In YAML 4:00:00 without quotes is the number 14400, and Slurm takes it for minutes.
            raise ValueError(
                f"launch.time={self.time} must be hours:minutes:seconds or days-hours:minutes:"
                "seconds, such as 4:00:00; in a YAML file in quotes"
            )
        limit = seconds_of(self.time)
        if limit is not None and self.signal_seconds >= limit:
            raise ValueError(
                f"launch.signal_seconds={self.signal_seconds} is not below launch.time={self.time}:"
                " the job would save and stop as soon as it has begun"
            )
        if self.memory and not _MEMORY.fullmatch(self.memory):
            raise ValueError(f"launch.memory={self.memory} must be a size such as 200G")
        for key in ("gpu_type", "partition", "account", "qos", "constraint", "job_name"):
            if re.search(r"\s", str(vars(self)[key])):
                raise ValueError(f"launch.{key}={vars(self)[key]} must not contain white space")
        self._check_lists()

    def _check_lists(self) -> None:
        for key in ("modules", "wrap", "srun_options", "sbatch_options"):
            for word in vars(self)[key]:
                if "\n" in word:
                    raise ValueError(f"launch.{key}: {word!r} must be one line")
                if key.endswith("options") and not word.startswith("-"):
                    raise ValueError(
                        f"launch.{key}: {word} is no option; write each with its value as one "
                        "word, --name=value"
                    )

    @property
    def num_nodes(self) -> int:
        """Machines that the run is spread over."""
        return self.nodes

    @property
    def gpus_of_node(self) -> int | None:
        """GPUs of a node."""
        return self.gpus_per_node

    @property
    def has_agent(self) -> bool:
        """Whether a task is torchrun's agent of a node; else it is a rank."""
        return True

    def check(self, run_dir: Path) -> list[str]:
        """Refuse what the cluster cannot give, and a folder that its nodes cannot see."""
        check_cluster(self)
        return [] if self.shared_disk else check_shared(run_dir, nodes=self.nodes)

    def describe(self, job: JobSpec) -> str:
        """The script and the command that submits it."""
        return describe_submission(self, job)

    def try_submission(self, job: JobSpec) -> None:
        """Ask whether Slurm would take the job; leaves its script in the run folder."""
        try_submission(self, job)

    def start(
        self,
        job: JobSpec,
        in_process: Callable[[list[str]], int],
        is_stopped: Callable[[], bool],
    ) -> None:
        """Submit the job."""
        submit(self, job)
