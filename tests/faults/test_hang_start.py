"""A rank whose others never come: it says that it waits for them, and ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dtune.config.compose import compose_overrides
from dtune.config.freeze import load_frozen
from dtune.run_folder import start_run_folder
from dtune.runtime.status import State, read_status
from tests.integration.train_runs import settings


@pytest.mark.slow
def test_a_rank_whose_others_never_come_ends_as_hung_and_blames_nobody(tmp_path: Path) -> None:
    argv = settings(tmp_path / "run", "parallel=ddp", "launch.nproc=2", "watch.start=1")
    text = compose_overrides("train", argv)
    start_run_folder(load_frozen(text), text, command=["dtune", "train", *argv])
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "dtune.worker", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    )
    # Killed, where the library that it waits in does not let it go.
    assert done.returncode in (1, -9), done.stderr
    status = read_status(tmp_path / "run")
    assert (status.state, status.rank, status.section) == (State.hung, -1, "start")
    assert "rank 0 in the start, waiting for the other ranks to come" in status.message
    assert "(watch.start)" in status.message
    assert status.message in done.stderr
