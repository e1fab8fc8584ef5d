"""Fixtures of the tests that need a world: of this process, or of several."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from dtune.runtime.world import World
from tests.distributed.pool import Pool

if not torch.cuda.is_available():
    # Read when Triton is first imported: kernels are interpreted in these processes.
    os.environ["TRITON_INTERPRET"] = "1"

_COMPILERS = {name: os.environ.get(name) for name in ("CC", "CXX")}


@pytest.fixture(autouse=True)
def _compilers_stay() -> Iterator[None]:
    """BOFT of HF peft, which tests compare with, leaves CXX=gcc behind, for all that comes after.

    torch.compile in ranks that are started then would link C++ without its library.
    """
    _restore_compilers()
    yield
    _restore_compilers()


def _restore_compilers() -> None:
    for name, value in _COMPILERS.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


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


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A world of this process alone, for the tests of one file."""
    world = World.start()
    yield world
    world.stop()


@pytest.fixture(scope="module", autouse=True)
def _no_world_is_left() -> Iterator[None]:
    """A world that a file leaves running would fail whichever file comes next."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("a test of this file started a world and did not stop it")
