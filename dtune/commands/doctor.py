"""``dtune doctor``: what this machine has, and what is missing for what."""

from __future__ import annotations

import sys

from dtune.doctor import report
from dtune.errors import ConfigError


def run(argv: list[str]) -> int:
    """Print the report."""
    if argv:
        raise ConfigError(f"dtune doctor takes no settings, got {' '.join(argv)}")
    sys.stdout.write(report())
    return 0
