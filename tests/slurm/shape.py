"""What a cluster of the tests claims to be, and its configuration files."""

from __future__ import annotations

import os
import pwd
import random
import socket
from dataclasses import dataclass
from pathlib import Path

_PORTS = range(20000, 30000)
"""The job script's rendezvous, by job id; below what the kernel hands out by itself."""

CONFIG = """\
ClusterName=dtune
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits for as long as credentials live; less than 5 s is refused.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
GresTypes=gpu
FirstJobId={first_job}

ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny

# Nodes may claim more than the host has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
# As sites do: refuse at once what can never run.
EnforcePartLimits=ALL

# A busy machine is slow to answer; a lost node is noticed after SlurmdTimeout.
MessageTimeout=30
SlurmctldTimeout=60
SlurmdTimeout={node_timeout}
InactiveLimit=0
KillWait={kill_wait}
MinJobAge=600
OverTimeLimit=0
CompleteWait=0
BatchStartTimeout=60
JobRequeue=1
MaxArraySize=1001
PreemptType=preempt/none

StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
# With -D they write to standard error, too.
SlurmctldLogFile=/dev/null
SlurmdLogFile=/dev/null
SlurmctldDebug=info
SlurmdDebug=info

{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=60 DefaultTime=30 State=UP GraceTime=0
"""


@dataclass(frozen=True)
class Shape:
    """What a cluster claims to be."""

    nodes: int = 4
    cpus: int = 4
    gpus: int = 2
    memory_mib: int = 4096
    kill_wait: int = 5
    """Seconds between SIGTERM and SIGKILL of scancel."""
    node_timeout: int = 60
    """Seconds without a sign after which a node is down."""

    @property
    def names(self) -> list[str]:
        return [f"n{index}" for index in range(1, self.nodes + 1)]


def write_config(folder: Path, shape: Shape) -> None:
    """Write slurm.conf and what it needs, with ports and job ids that nobody has now."""
    host, user = socket.gethostname().split(".")[0], pwd.getpwuid(os.getuid()).pw_name
    ports = _free_ports(shape.nodes + 1)
    gpus = [folder / "gpus" / f"gpu{index}" for index in range(shape.gpus)]
    for path in gpus:
        path.symlink_to(os.devnull)  # slurmd wants a device.
    gres = f"Gres=gpu:{len(gpus)}" if gpus else ""
    nodes = [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
        f"CPUs={shape.cpus} RealMemory={shape.memory_mib} {gres} State=UNKNOWN"
        for node, port in zip(shape.names, ports[1:], strict=True)
    ]
    text = CONFIG.format(
        host=host,
        user=user,
        port=ports[0],
        folder=folder,
        first_job=_first_job(),
        node_timeout=shape.node_timeout,
        kill_wait=shape.kill_wait,
        nodes="\n".join(nodes),
    )
    devices = f"Name=gpu Count={len(gpus)} File={folder}/gpus/gpu[0-{len(gpus) - 1}]"
    lines = [f"NodeName={node} {devices}\n" for node in shape.names]
    (folder / "slurm.conf").write_text(text, encoding="utf-8")
    (folder / "gres.conf").write_text("".join(lines) if gpus else "", encoding="utf-8")
    (folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\n", encoding="utf-8")


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, outside of what the kernel and jobs take."""
    generator = random.SystemRandom()
    while True:
        first = generator.randrange(10000, _PORTS.start - count)
        ports = list(range(first, first + count))
        if all(map(_is_free, ports)):
            return ports


def _first_job() -> int:
    """An id whose rendezvous port, and those of the next 100 jobs, are free."""
    generator = random.SystemRandom()
    while True:
        first = generator.randrange(1, 9900)
        if all(_is_free(_PORTS.start + job) for job in range(first, first + 100)):
            return first


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
