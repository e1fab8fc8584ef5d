"""Questions to Slurm's clients: what nodes have, how a job stands, why it was refused."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dtune_launch.spec import LaunchError

if TYPE_CHECKING:
    from dtune_launch.schema.slurm import SlurmConfig

# A question must not hold the user up: without an answer sbatch is asked itself.
_ASK_SECONDS = 0.8
WAITING = tuple("PENDING REQUEUED REQUEUE_HOLD REQUEUE_FED SPECIAL_EXIT".split())
WORKING = tuple(
    "RUNNING COMPLETING CONFIGURING RESIZING SIGNALING STAGE_OUT STOPPED SUSPENDED".split()
)
ALIVE = WAITING + WORKING
"""States of a job that has not ended; ``job.sh`` has the same."""
OVER = tuple(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY TIMEOUT".split()
)
"""States of a job that has surely ended; one that is PREEMPTED may be requeued."""


def run_client(command: Sequence[str], *, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a client of Slurm; without an answer in time its return code is 124."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        said = f"{command[0]}: no answer from Slurm within {seconds:g} s"
        return subprocess.CompletedProcess(list(command), 124, "", said)


def require_slurm(launcher: str) -> None:
    """Raise LaunchError where this machine has no clients of Slurm."""
    for tool in ("sbatch", "scancel", "scontrol"):
        if shutil.which(tool) is None:
            raise LaunchError(
                f"launch={launcher} submits with Slurm, and {tool} is not on the PATH of this "
                "machine; call dtune on a login node of the cluster (perhaps after `module load "
                "slurm`), or set launch=local"
            )


@dataclass(frozen=True)
class Nodes:
    """Nodes of one kind in a partition."""

    partition: str
    is_default: bool
    count: int
    gpus: dict[str, int]
    """Of a node, by the name of their type; without one under the empty name."""
    cpus: int
    max_time: str
    """Longest job, as Slurm writes it: 1-00:00:00, infinite."""


def seconds_of(limit: str) -> int | None:
    """Seconds of a time limit as Slurm reads it; None for none."""
    if not limit or limit[0].isalpha():
        return None
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    # With days the first is hours; without, two of them are minutes and seconds.
    weights = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(a * b for a, b in zip(parts, weights, strict=False))


def ask_nodes() -> list[Nodes] | None:
    """The nodes of every partition; None where Slurm does not tell."""
    done = run_client(["sinfo", "--noheader", "--format=%P|%D|%G|%c|%l"], seconds=_ASK_SECONDS)
    return None if done.returncode else parse_nodes(done.stdout)


def parse_nodes(text: str) -> list[Nodes]:
    """Lines of ``partition|nodes|gres|cpus|limit``: ``debug*|2|gpu:a100:4(S:0-1)|64|1:00:00``."""
    found = []
    for line in text.splitlines():
        partition, count, gres, cpus, max_time = line.split("|")
        gpus: dict[str, int] = {}
        for kind, number in re.findall(r"\bgpu(?::([A-Za-z][\w.-]*))?:(\d+)", gres):
            gpus[kind] = gpus.get(kind, 0) + int(number)
        found.append(
            Nodes(
                partition.rstrip("*"),
                partition.endswith("*"),
                int(count),
                gpus,
                int(cpus.rstrip("+")),
                max_time,
            )
        )
    return found


def check_cluster(config: SlurmConfig) -> None:
    """Raise LaunchError for what the cluster does not have, as far as Slurm tells at once."""
    require_slurm(config.name)
    # At once where no controller listens, of which sinfo and sbatch try for many seconds.
    ping = run_client(["scontrol", "ping"], seconds=_ASK_SECONDS).stdout
    if " is DOWN" in ping and " is UP" not in ping:
        raise LaunchError(
            f"Slurm's controller does not answer: {ping.strip().splitlines()[0]}; nothing was "
            "submitted: try again later, or set launch=local"
        )
    nodes = ask_nodes()
    if nodes:
        check_nodes(config, nodes)


def check_nodes(config: SlurmConfig, nodes: Sequence[Nodes]) -> None:
    """Raise LaunchError for more nodes, GPUs of a node or time than a partition has."""
    partitions = sorted({kind.partition for kind in nodes})
    wanted = config.partition.split(",") if config.partition else []
    for name in wanted:
        if name not in partitions:
            raise LaunchError(
                f"launch.partition={name} does not exist on this cluster; it has "
                f"{', '.join(partitions)}"
            )
    kinds = [kind for kind in nodes if (kind.partition in wanted if wanted else kind.is_default)]
    if not kinds:
        return
    where = f"partition {config.partition or kinds[0].partition}"
    most = max(_gpus(kind, config.gpu_type) for kind in kinds)
    if config.gpus_per_node > most:
        kind = f" of type {config.gpu_type}" if config.gpu_type else ""
        raise LaunchError(
            f"launch.gpus_per_node={config.gpus_per_node} is above the {most} GPUs{kind} that a "
            f"node of {where} has; set launch.gpus_per_node={most}"
            + (" and more launch.nodes" if most else ", or another launch.partition")
        )
    fitting = sum(k.count for k in kinds if _gpus(k, config.gpu_type) >= config.gpus_per_node)
    if config.nodes > fitting:
        has = f" with {config.gpus_per_node} GPUs" if config.gpus_per_node else ""
        raise LaunchError(
            f"launch.nodes={config.nodes} is above the {fitting} nodes{has} of {where}"
        )
    _check_time(config, kinds, where)


def _check_time(config: SlurmConfig, kinds: Sequence[Nodes], where: str) -> None:
    """Many clusters take a job that is too long for its partition, and never start it."""
    limits = {seconds_of(kind.max_time): kind.max_time for kind in kinds}
    # A quality of service may allow more.
    if config.qos or not config.time or None in limits:
        return
    longest = max(limit for limit in limits if limit is not None)
    most, asked = limits[longest], seconds_of(config.time)
    if asked is None or asked > longest:
        raise LaunchError(
            f"launch.time={config.time} is above the {most} that {where} lets a job run; set "
            f"launch.time={most}: at its end the job saves, is requeued and goes on"
        )


def _gpus(kind: Nodes, gpu_type: str) -> int:
    return kind.gpus.get(gpu_type, 0) if gpu_type else sum(kind.gpus.values())


# Words of a refusal, and the settings that it is probably about; the first that fits counts.
_LIKELY = (
    (r"qos|quality of service", "launch.qos"),
    (r"\baccount\b", "launch.account, with launch.partition and launch.qos"),
    (r"partition", "launch.partition"),
    (r"time limit|timelimit", "launch.time"),
    (r"gres|gpu", "launch.gpus_per_node, launch.gpu_type or launch.gres"),
    (r"memory", "launch.memory"),
    (r"constraint|feature", "launch.constraint"),
    (
        r"node count|more processors|node configuration|cpu count",
        "launch.nodes, launch.cpus_per_process, launch.memory or launch.gpus_per_node",
    ),
    (r"unrecognized option|invalid option|invalid argument", "launch.sbatch_options"),
)


def explain_refusal(said: str, script: Path) -> str:
    """Slurm's own words, which script it was, and the setting that is likely wrong."""
    lines = [
        re.sub(r"^(sbatch|allocation failure|srun): (error: )?", "", line.strip())
        for line in said.splitlines()
        if line.strip()
    ]
    words = "; ".join(dict.fromkeys(lines)) or "no reason given"
    text = f"Slurm did not take the job: {words}; the script is {script}"
    if re.search(r"contact|connect|no answer|timed out|configuration source", words, re.IGNORECASE):
        return f"{text}; nothing was submitted: try again when Slurm's controller answers"
    for pattern, keys in _LIKELY:
        if re.search(pattern, words, re.IGNORECASE):
            return f"{text}; see {keys}"
    return text


def job_state(job_id: str) -> str:
    """How Slurm says that a job stands, in a phrase; empty where it does not know it (any more)."""
    if shutil.which("squeue") is None:
        return ""
    form = "--format=%T|%R|%M|%l"
    done = run_client(["squeue", "--noheader", form, f"--jobs={job_id}"], seconds=10)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if not done.returncode and lines:
        state, where, used, limit = lines[0].split("|")
        return f"{state} {where} {used} of {limit}".replace("  ", " ")
    done = run_client(["scontrol", "show", "job", "--oneliner", job_id], seconds=10)
    found = re.search(r"\bJobState=(\w+)", done.stdout)
    if found is None and shutil.which("sacct") is not None:
        command = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=State"]
        done = run_client([*command, f"--jobs={job_id}"], seconds=10)
        found = None if done.returncode else re.search(r"(\w+)", done.stdout)
    return found[1] if found else ""
