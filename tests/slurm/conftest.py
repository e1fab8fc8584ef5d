"""The cluster of the tests of this folder, started once by each process that runs some of them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import INSTALL, Cluster, missing_tools, one_host_cluster

REQUIRED = "DTUNE_REQUIRE_SLURM"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes with four CPUs and two fake GPUs each."""
    if missing := missing_tools():
        reason = f"{', '.join(missing)} not found; {INSTALL}"
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{REQUIRED}=1, but {reason}")
        pytest.skip(reason)
    with one_host_cluster() as it:
        yield it
