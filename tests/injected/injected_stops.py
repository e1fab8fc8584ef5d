"""Stops a process in a function until a signal ends it.

``DTUNE_TEST_WAIT_IN``: module, function in it, and a file that is made once it is there, in a line.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import ModuleType
from typing import NoReturn

MODULE, NAME, MARK = os.environ["DTUNE_TEST_WAIT_IN"].split()
LONGEST_SECONDS = 300.0


def patch(module: ModuleType) -> None:
    """Let the function wait in place of what it does."""
    *owners, name = NAME.split(".")
    owner = vars(module)[owners[0]] if owners else module

    def wait(*args: object, **kwargs: object) -> NoReturn:
        Path(MARK).touch()
        time.sleep(LONGEST_SECONDS)
        raise AssertionError("no signal came")

    setattr(owner, name, wait)
