"""Fixtures of the tests that run on several processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Pool]:
    """A process of its own, started once."""
    pool = Pool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Pool]:
    """Two gloo ranks on this machine, started once."""
    pool = Pool(2)
    yield pool
    pool.close()
