"""A SLURM of a few nodes on this one host: real daemons, fake GPUs, no systemd, no cgroups.

Each has a folder, ports and a munge key of its own, so that several can run side by side, and
ends only what it has started. ``python -m tests.slurm.cluster`` opens a shell on one.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.slurm.shape import Shape, write_config

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo")
INSTALL = "apt-get install -y --no-install-recommends slurm-wlm munge"
MARK = "DTUNE_TEST_CLUSTER"
"""Variable of the daemons, and of the step daemons that they start: the node."""
LONGEST_PAUSE = 0.3
"""Seconds between two looks at what is waited for."""
_SBIN = "/usr/sbin:/sbin"
_PR_SET_PDEATHSIG = 1


class ClusterError(AssertionError):
    """The cluster did not do in time what a test waited for; shows its logs."""


def missing_tools() -> list[str]:
    """Programs of SLURM and munge that this machine lacks."""
    return [tool for tool in TOOLS if shutil.which(tool, path=_search_path()) is None]


@contextmanager
def one_host_cluster(shape: Shape | None = None) -> Iterator[Cluster]:
    """Start a cluster in a folder of its own; on the way out end its jobs and daemons."""
    folder = Path(tempfile.mkdtemp(prefix="dtune-slurm-", dir="/tmp"))
    cluster = Cluster(folder, shape or Shape())
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


class Cluster:
    """The daemons, and the clients that talk to them."""

    def __init__(self, folder: Path, shape: Shape) -> None:
        self.folder = folder
        self.shape = shape
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        path = _search_path()
        self.env = {"PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
        """What a process needs beside its own environment to be a client of this cluster."""

    # --- daemons ---

    def start(self) -> None:
        """Start munged, slurmctld and one slurmd a node; wait until every node is idle."""
        for name in ("state", "log", "munge", "gpus", *(f"spool/{n}" for n in self.shape.names)):
            (self.folder / name).mkdir(parents=True)
        for path in (self.folder, self.folder / "munge"):
            path.chmod(0o755)  # munged refuses a socket that others could not reach.
        write_config(self.folder, self.shape)
        self._start_munge()
        self._start_daemon("slurmctld", "slurmctld", "-D", "-c", "-f", self.env["SLURM_CONF"])
        for node in self.shape.names:
            self.start_node(node)
        self._wait(self._all_idle, "every node is idle", 60)

    def stop(self) -> None:
        """End the daemons and what runs in jobs; nothing else."""
        for process in self._daemons.values():
            process.kill()
            process.wait()
        _end_all(lambda: self._processes(f"SLURM_CONF={self.env['SLURM_CONF']}"))

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        self._start_daemon(
            node, "slurmd", "-D", "-N", node, "-f", self.env["SLURM_CONF"], node=node
        )

    def kill_node(self, node: str) -> None:
        """Lose a node: SIGKILL its slurmd and everything that runs on it."""
        self._daemons[node].kill()
        self._daemons[node].wait()
        words = (f"{MARK}={node}", f"SLURMD_NODENAME={node}")
        _end_all(lambda: self._processes(*words))

    def take_down(self, node: str) -> None:
        """Say that a node is down, as an administrator does; healthy, it comes back by itself."""
        self.client("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    # --- clients ---

    def client(self, *command: str, check: bool = True) -> str:
        """Run a SLURM command; its standard output."""
        done = self.run(*command)
        if check and done.returncode:
            raise ClusterError(f"{shlex.join(command)}: {done.stderr}\n{self.logs()}")
        return done.stdout.strip()

    def run(
        self,
        *command: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run any command as a client of this cluster; ``env`` replaces this process's own."""
        return subprocess.run(
            command,
            env={**(os.environ if env is None else env), **self.env},
            cwd=cwd or self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def submit(
        self, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> str:
        """``sbatch`` with these arguments; the job's id. ``env`` comes beside this process's."""
        done = self.run(
            "sbatch", "--parsable", *arguments, cwd=cwd, env={**os.environ, **(env or {})}
        )
        if done.returncode:
            raise ClusterError(f"sbatch {shlex.join(arguments)}: {done.stderr}\n{self.logs()}")
        return done.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """Fields of a job, or of one element of an array (``12_3``)."""
        records = self.elements(job)
        assert len(records) == 1, f"job {job} has {len(records)} elements"
        return records[0]

    def elements(self, job: str) -> list[dict[str, str]]:
        """Fields of every element of an array job, in the order of their indices."""
        lines = self.client("scontrol", "show", "job", "-o", job).splitlines()
        records = [dict(word.partition("=")[::2] for word in line.split()) for line in lines]
        return sorted(records, key=lambda record: int(record.get("ArrayTaskId", "0")))

    def state(self, job: str) -> str:
        """JobState, as PENDING, RUNNING or COMPLETED."""
        return self.show(job)["JobState"]

    def restarts(self, job: str) -> int:
        """Times that a job was requeued."""
        return int(self.show(job)["Restarts"])

    def wait_for(self, job: str, *states: str, timeout: float = 400) -> None:
        """Wait until the job is in one of the states; fail at once where it cannot be any more."""
        ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL"}

        def is_there() -> bool:
            state = self.state(job)
            if state in ended - set(states):
                raise ClusterError(f"job {job} is {state}, not {states}\n{self.logs(job)}")
            return state in states

        self._wait(is_there, f"job {job} is {' or '.join(states)}", timeout, job)

    def wait_until(
        self, holds: Callable[[], bool], what: str, *, job: str = "", timeout: float = 400
    ) -> None:
        """Poll until something holds; ClusterError with the job's output where it never does."""
        self._wait(holds, what, timeout, job)

    def tasks(self, job: str) -> list[int]:
        """Processes that run in the steps of a job, and not in its batch script."""
        return [
            pid
            for pid in self._processes(f"SLURM_JOB_ID={job}")
            if b"SLURM_STEP_NODELIST=" in _read(Path(f"/proc/{pid}/environ"))
        ]

    def logs(self, job: str = "") -> str:
        """What a failure has to show: ends of the daemons' logs, the job, and what it has said."""
        parts = [_tail(path, 600) for path in sorted((self.folder / "log").iterdir())]
        if job:
            shown = self.run("scontrol", "show", "job", job).stdout
            words = dict(word.partition("=")[::2] for word in shown.split())
            said = sorted(Path(words.get("WorkDir", os.devnull)).glob("**/logs/*.log"))
            outputs = [*said, Path(words.get("StdOut", os.devnull))]
            parts += [shown, *(_tail(path, 3000) for path in outputs)]
        return "\n".join(parts)

    # --- inside ---

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        key = folder / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = [f"--{name}-file={folder / name}" for name in ("key", "pid", "log", "seed")]
        self._start_daemon(
            "munged", "munged", "--foreground", "--force", f"--socket={folder / 'socket'}", *files
        )
        self._wait((folder / "socket").is_socket, "munged listens", 30)

    def _start_daemon(self, name: str, *command: str, node: str = "") -> None:
        path = shutil.which(command[0], path=self.env["PATH"])
        assert path is not None, command[0]
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [path, *command[1:]],
                # A clean environment: what runs inside a job must come from its submitter.
                env={**self.env, MARK: node},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def _processes(self, *words: str) -> list[int]:
        """Processes that have one of the words in their environment, and are this cluster's."""
        config = f"SLURM_CONF={self.env['SLURM_CONF']}".encode()
        wanted = {word.encode() for word in words}
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment = set((path / "environ").read_bytes().split(b"\0"))
            except OSError:
                continue  # It has just ended, or is another user's.
            if config in environment and environment & wanted and int(path.name) != os.getpid():
                found.append(int(path.name))
        return found

    def _all_idle(self) -> bool:
        nodes = self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").stdout.split()
        return set(nodes) == set(self.shape.names)

    def _wait(self, holds: Callable[[], bool], what: str, timeout: float, job: str = "") -> None:
        began = time.monotonic()
        deadline = began + timeout
        while not holds():
            for name, process in self._daemons.items():
                if process.poll() not in (None, -signal.SIGKILL):
                    raise ClusterError(f"{name} ended with {process.returncode}\n{self.logs()}")
            if time.monotonic() > deadline:
                raise ClusterError(f"not in {timeout:g} s: {what}\n{self.logs(job)}")
            # Most ask SLURM, by a process each time, and a job that is waited for needs the CPU.
            time.sleep(min(0.05 + 0.05 * (time.monotonic() - began), LONGEST_PAUSE))


def _search_path() -> str:
    return os.environ.get("PATH", os.defpath) + ":" + _SBIN


def _tail(path: Path, size: int) -> str:
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "(none)"
    return f"--- {path}\n{text[-size:]}"


def _read(path: Path) -> bytes:
    """Contents of a file of a process; empty where it has just ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _end_all(find: Callable[[], list[int]]) -> None:
    """SIGKILL processes until none is found: some may have been starting others."""
    deadline = time.monotonic() + 30
    while pids := find():
        assert time.monotonic() < deadline, f"{pids} do not end"
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _die_with_parent() -> None:
    # Daemons whose test process was killed would stay for ever.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> int:
    """Start a cluster and open a shell on it; it ends with the shell."""
    if missing := missing_tools():
        sys.stderr.write(f"{', '.join(missing)} not found; {INSTALL}\n")
        return 1
    with one_host_cluster() as cluster:
        sys.stderr.write(f"two nodes in {cluster.folder}; sinfo, sbatch, ...; exit ends them\n")
        shell = os.environ.get("SHELL", "/bin/sh")
        return subprocess.run([shell], env={**os.environ, **cluster.env}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
