"""``dtune config``: print the composed, resolved config."""

from __future__ import annotations

import sys

from dtune.config.compose import compose


def run(argv: list[str]) -> int:
    """Print the frozen text of the settings."""
    text = compose("train", argv)
    if text is not None:
        sys.stdout.write(text)
    return 0
