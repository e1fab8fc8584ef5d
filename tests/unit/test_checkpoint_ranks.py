"""Checkpoints of two processes: any split and any number of ranks reads them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dtune.checkpoint.reader import find_checkpoint, load_checkpoint
from dtune.runtime.world import World
from tests.unit import checkpoint_ranks
from tests.unit.checkpoint_runs import IDENTITY, HoldingEngine, write_run

ROOT = Path(__file__).parents[2]


def start_rank(rank: int, port: int, folder: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, checkpoint_ranks.__file__, str(folder)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, world: World) -> tuple[Path, str]:
    """The folder that two processes have worked in, and what they complained of."""
    folder = tmp_path_factory.mktemp("ranks")
    write_run(folder / checkpoint_ranks.one_process_is_read_by_two.__name__, world, 1, 2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [start_rank(rank, port, folder) for rank in (0, 1)]
    said = [process.communicate(timeout=400)[1] for process in processes]
    return folder, "\n".join(f"rank {rank}: {text[-3000:]}" for rank, text in enumerate(said))


@pytest.mark.parametrize("name", [case.__name__ for case in checkpoint_ranks.CASES])
def test_on_two_ranks(outcome: tuple[Path, str], name: str) -> None:
    folder, said = outcome
    assert (folder / f"{name}.passed").exists(), said


def test_two_ranks_are_read_by_one_process(outcome: tuple[Path, str], world: World) -> None:
    run_dir = outcome[0] / "saved_under_one_split_and_loaded_under_another"
    for step in (1, 2):
        path = run_dir / "checkpoints" / f"step-{step:08d}"
        info = find_checkpoint(run_dir, str(path), world)
        assert info is not None
        assert info.manifest.world_size == 2
        engine = HoldingEngine(world)
        load_checkpoint(info, engine=engine, identity=IDENTITY, world=world)
        assert engine.holds(step)
