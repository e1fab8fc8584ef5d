"""Importing torch and what is built on it, which takes seconds of every process that starts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
