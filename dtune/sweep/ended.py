"""How the sweeps that this process has launched came out: Hydra has no way to hand it on."""

from __future__ import annotations

_codes: list[int] = []


class SweepStopped(SystemExit):
    """Raised through Hydra where a signal has ended a sweep; it carries the exit code."""


def note_end(code: int) -> None:
    """Remember the exit code of a batch of trials."""
    _codes.append(code)


def exit_code() -> int:
    """Of all batches: 1 where a trial has failed, 75 where one is left to go on with, else 0."""
    return 1 if 1 in _codes else max(_codes, default=0)
