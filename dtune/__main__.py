"""``python -m dtune`` and ``torchrun -m dtune``."""

import sys

from dtune.cli import main

sys.exit(main())
