"""``python -m dtune`` and ``torchrun -m dtune``."""

import signal
import sys

from dtune.cli import main

try:
    code = main()
finally:
    # Python takes its handlers away before it ends: one more signal would make it a failure.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
sys.exit(code)
