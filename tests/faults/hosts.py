"""Two hosts on this machine: network namespaces that a pair of virtual interfaces connects."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.injection import kill

_NET = "10.213.77"


def _ip(*arguments: str) -> str:
    done = subprocess.run(
        ["ip", *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Host:
    """One of them."""

    namespace: str
    address: str
    interface: str

    def start(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a Python module there; what it says is added to ``log``."""
        with log.open("ab") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, sys.executable, "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": self.interface},
                start_new_session=True,
            )

    def processes(self) -> list[int]:
        """Everything that runs there."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def link(self, state: str) -> None:
        """Set the interface ``up``, or ``down``: then no packet comes or goes."""
        _ip("-n", self.namespace, "link", "set", self.interface, state)


REQUIRED = "DTUNE_REQUIRE_HOSTS"


def require_hosts() -> None:
    """Skip a test where there can be no two hosts; with ``DTUNE_REQUIRE_HOSTS=1`` it fails."""
    if reason := why_not():
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{REQUIRED}=1, but {reason}")
        pytest.skip(reason)


def why_not() -> str:
    """Why there can be no two hosts here; empty where there can."""
    if os.geteuid():
        return "network namespaces take root"
    if shutil.which("ip") is None:
        return "the command ip (package iproute2) is not installed"
    try:
        _ip("netns", "add", f"dtune-try-{os.getpid()}")
        _ip("netns", "delete", f"dtune-try-{os.getpid()}")
    except OSError as error:
        return f"no network namespaces: {error}"
    return ""


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two connected hosts, and nothing else that they reach; all in them is killed at the end."""
    mark = os.getpid()
    hosts = tuple(
        Host(f"dtune-{name}-{mark}", f"{_NET}.{number}", f"dt{name}{mark}")
        for number, name in enumerate("ab", start=1)
    )
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        first, second = hosts
        link = ("link", "add", first.interface, "netns", first.namespace, "type", "veth")
        _ip(*link, "peer", "name", second.interface, "netns", second.namespace)
        for host in hosts:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.interface)
            host.link("up")
        yield first, second
    finally:
        for host in hosts:
            with suppress(OSError):
                for pid in host.processes():
                    kill(pid)
            with suppress(OSError):
                _ip("netns", "delete", host.namespace)
