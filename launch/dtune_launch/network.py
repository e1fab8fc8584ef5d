"""The head of a job of several machines: its name, its port, and the way to it."""

from __future__ import annotations

import ipaddress
import queue
import socket
import threading

from dtune_launch.spec import LaunchError

# With a second to compose the config, a wrong name is told within two.
_RESOLVE_SECONDS = 0.8


def split_head(head: str) -> tuple[str, int]:
    """Host and port of ``launch.head``; LaunchError where it has not both."""
    host, colon, port = head.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
        raise LaunchError(f"launch.head={head} must be HOST:PORT, such as node1:29400")
    return host, int(port)


def resolve_host(host: str) -> str:
    """Address of a host by its name or address; LaunchError, soon, where it has none."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass  # A name.
    answer: queue.SimpleQueue[str | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]))
        except OSError as error:
            answer.put(error)

    # A name server that does not answer would hold this process for half a minute.
    threading.Thread(target=ask, daemon=True).start()
    try:
        found = answer.get(timeout=_RESOLVE_SECONDS)
    except queue.Empty:
        found = TimeoutError(f"no answer within {_RESOLVE_SECONDS} s")
    if isinstance(found, OSError):
        why = found.strerror or str(found)
        raise LaunchError(
            f"launch.head: the name {host} does not resolve on this machine ({why}); name the "
            "machine with launch.node_rank=0 by its IP address"
        )
    return found


def address_towards(head: str) -> str:
    """Address of this machine on the way to the head, by which the others reach it."""
    name, port = split_head(head)
    host = resolve_host(name)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing: it only looks the way up.
            probe.connect((host, port))
        except OSError as error:
            raise LaunchError(
                f"launch.head={head}: this machine has no way to {host} ({error.strerror})"
            ) from error
        return str(probe.getsockname()[0])


def check_port_free(head: str) -> None:
    """Raise LaunchError unless the port of the head is free on this machine."""
    _, port = split_head(head)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # What has just ended may still be closing its connections, which is no matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            # On all addresses, as the store is that the nodes meet at.
            probe.bind(("", port))
        except OSError as error:
            raise LaunchError(
                f"launch.head={head}: port {port} cannot be taken on this machine "
                f"({error.strerror}); choose another, the same on all machines"
            ) from error
