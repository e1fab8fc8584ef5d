"""Watchers that find each other in any order."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest

from dtune.runtime.watch.client import Watch
from dtune.runtime.watch.schema import WatchConfig
from dtune.runtime.watch.wire import Line, Message

SECRET = "of this run"


def heard(line: Line, seconds: float) -> list[Message] | None:
    """The first messages that come; none in time: []; None where the other end has hung up."""
    deadline = time.monotonic() + seconds
    while not (messages := line.receive()):
        if messages is None or time.monotonic() > deadline:
            return messages
    return messages


def is_own(address: str) -> bool:
    """Whether this machine can be called by an address."""
    try:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        socket.create_server((address, 0), family=family).close()
    except OSError:
        return False
    return True


def test_a_watcher_that_calls_before_the_first_rank_has_met_it_is_heard(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    watch = Watch(WatchConfig(), str(tmp_path), rank=0)
    try:
        port = watch.listen(local=True)
        line = Line(socket.create_connection(("127.0.0.1", port)))
        line.socket.settimeout(1.0)
        line.send("hello", rank=1, secret=SECRET)
        assert line.receive() == [], "nobody answers yet, and nobody hangs up"
        watch.meet(2, secret=SECRET)
        line.send("here", rank=1)
        pinged = heard(line, 60)
        assert pinged is not None, "hung up on"
        assert pinged[0]["kind"] == "ping"
        line.close()
    finally:
        watch.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_ranks_of_other_machines_call_by_either_kind_of_address(
    tmp_path: Path, address: str
) -> None:
    if not is_own(address):
        pytest.skip(f"this machine has no {address}")
    (tmp_path / "logs").mkdir()
    watch = Watch(WatchConfig(), str(tmp_path), rank=0)
    try:
        port = watch.listen(local=False)
        watch.meet(2, secret=SECRET)
        line = Line(socket.create_connection((address, port)))
        line.send("hello", rank=1, secret=SECRET)
        assert heard(line, 60), "nobody answers"
        line.close()
    finally:
        watch.close()


@pytest.mark.parametrize(
    "said",
    [
        b'{"kind": "hello", "rank": 1, "secret": "of another"}\n',
        b"GET / HTTP/1.0\r\n\r\n",
        b"1\n",
        b'{"rank": 1}\n',
    ],
)
def test_a_stranger_is_hung_up_on_and_others_are_heard(tmp_path: Path, said: bytes) -> None:
    (tmp_path / "logs").mkdir()
    watch = Watch(WatchConfig(), str(tmp_path), rank=0)
    try:
        port = watch.listen(local=True)
        watch.meet(2, secret=SECRET)
        stranger = socket.create_connection(("127.0.0.1", port))
        stranger.sendall(said)
        assert heard(Line(stranger), 60) is None
        line = Line(socket.create_connection(("127.0.0.1", port)))
        line.send("hello", rank=1, secret=SECRET)
        pinged = heard(line, 60)
        assert pinged is not None
        assert pinged[0]["kind"] == "ping"
        line.close()
        stranger.close()
    finally:
        watch.close()
