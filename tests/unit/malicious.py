"""Files that run a command when they are read without care: the command makes a canary."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import torch


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def pickled(canary: Path) -> bytes:
    return pickle.dumps(Payload(canary))


def saved_by_torch(canary: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": Payload(canary)}, buffer)
    return buffer.getvalue()


def is_armed(data: bytes, canary: Path) -> bool:
    """Whether the bytes do run the command, read without care; the canary is removed again."""
    if data.startswith(b"PK"):
        torch.load(io.BytesIO(data), weights_only=False)
    else:
        pickle.loads(data)
    found = canary.exists()
    canary.unlink(missing_ok=True)
    return found
