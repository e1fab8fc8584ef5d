"""Importing torch and what is built on it, which takes seconds of every process that starts."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

_DISABLES = "TORCHDYNAMO_DISABLE"


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without looking for garbage, and never look at what was imported again.

    A million objects are made that stay until the end. Without this a fifth of the time of the
    imports goes into finding that out again and again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Import with ``torch.compile`` as a decorator that changes nothing; of use on the main thread.

    bitsandbytes, which ``peft`` imports, has four functions for devices without kernels compiled
    while it is imported: more than a second goes into importing Inductor for them.
    """
    before = os.environ.get(_DISABLES)
    os.environ[_DISABLES] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_DISABLES]
        else:
            os.environ[_DISABLES] = before
