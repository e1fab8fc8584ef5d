"""What goes wrong before a kernel is launched."""

from __future__ import annotations


class KernelArgumentError(ValueError):
    """An argument does not fit: names the op, the argument, what came and what is wanted."""


class KernelUnavailable(RuntimeError):
    """Triton cannot run here: says why, and which key to turn."""
