"""Fixtures of the tests that need a world: of this process, or of several."""

from __future__ import annotations

import gc
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

FAULT_TESTS = (
    "tests/faults/",
    "tests/slurm/",
    "tests/unit/test_checkpoint_",
    "tests/unit/test_run_lock",
    "tests/unit/test_trackers",
    "tests/unit/test_tracker_servers",
    "tests/unit/test_launch_secrets",
    "tests/distributed/test_move",
    "tests/distributed/test_watched_world",
    "tests/integration/test_lock",
    "tests/integration/test_malicious",
    "tests/integration/test_restarts",
    "tests/integration/test_resume",
    "tests/integration/test_signals",
)
"""Where what is done to a run is tested."""

# Until all tests are imported: see dtune.runtime.imports.
gc.disable()

_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_BEFORE = {name: os.environ.get(name) for name in ("CC", "CXX", *_RANK)}


def pytest_collection_finish() -> None:
    """From here on garbage is looked for, but not among what was imported."""
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what the tests of faults took: eight minutes of two cores are what they may."""
    phases = [
        report
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport) and report.nodeid.startswith(FAULT_TESTS)
    ]
    if not phases:
        return
    tests = len({report.nodeid for report in phases})
    minutes = sum(report.duration for report in phases) / 60
    processes = int(terminalreporter.config.getoption("numprocesses", None) or 1)
    terminalreporter.write_line(
        f"tests of faults: {tests} took {minutes:.1f} minutes of one process, "
        f"{minutes / processes:.1f} of all {processes}"
    )


@pytest.fixture(autouse=True)
def _environment_stays() -> Iterator[None]:
    """What a test leaves in the environment would change all that comes after it.

    BOFT of HF peft, which tests compare with, leaves CXX=gcc behind, with which torch.compile links
    C++ without its library; DeepSpeed in this process leaves the variables of a rank.
    """
    _restore_environment()
    yield
    _restore_environment()


def _restore_environment() -> None:
    for name, value in _BEFORE.items():
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
