"""Messages between watchers: JSON lines over sockets. Standard library only."""

from __future__ import annotations

import json
import socket
from typing import Any

Message = dict[str, Any]

LONGEST = 1 << 24
"""Bytes of a message, at most."""


class Line:
    """One end of a connection that carries messages; never blocks for long."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        connection.settimeout(5.0)
        self._buffer = b""

    def fileno(self) -> int:
        """For selectors."""
        return self.socket.fileno()

    def send(self, kind: str, **content: object) -> bool:
        """Send a message; whether the other end is there to take it."""
        try:
            self.socket.sendall(json.dumps({"kind": kind, **content}).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[Message] | None:
        """What has come, when the socket is readable.

        None where the other end has gone, or is none of ours: anyone may call an open port.
        """
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        try:
            found = [json.loads(line) for line in lines]
        except ValueError:
            return None
        ours = all(isinstance(message, dict) and "kind" in message for message in found)
        return found if ours and len(self._buffer) < LONGEST else None

    def close(self) -> None:
        """Hang up."""
        self.socket.close()
