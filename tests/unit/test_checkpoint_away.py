"""A disk that is away when a run goes on: the checkpoint on it is not taken for damaged."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dtune import worker
from dtune.checkpoint import manifest, visible
from dtune.checkpoint.layout import hash_file
from dtune.checkpoint.reader import find_checkpoint
from dtune.checkpoint.visible import await_file
from dtune.errors import CheckpointError
from dtune.runtime.status import State
from dtune.runtime.world import World
from dtune.worker import state_of
from tests.unit.checkpoint_runs import write_run


@pytest.fixture
def run_dir(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder with steps 1 and 2."""
    write_run(tmp_path, world, 1, 2)
    monkeypatch.setattr(visible, "_AGAIN_SECONDS", 0.01)
    return tmp_path


def failing(code: int, times: float) -> Callable[[Path], str]:
    """`hash_file` that first fails so often on the files of step 2."""
    left = [times]

    def read(path: Path) -> str:
        if "step-00000002" in path.parts and left[0] > 0:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return hash_file(path)

    return read


def test_a_disk_that_comes_back_is_waited_for(
    run_dir: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "hash_file", failing(errno.ESTALE, 5))
    found = find_checkpoint(run_dir, "auto", world)
    assert found is not None
    assert found.step == 2


def test_a_disk_that_stays_away_is_no_damage(
    run_dir: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "hash_file", failing(errno.ESTALE, float("inf")))
    monkeypatch.setattr(visible, "VISIBLE_SECONDS", 0.05)
    with pytest.raises(
        CheckpointError, match=r"cannot be read now.*index.json.*\(ESTALE\)"
    ) as raised:
        find_checkpoint(run_dir, "auto", world)
    assert state_of(raised.value) is State.failed, "it may be tried again"
    assert [path.name for path in sorted((run_dir / "checkpoints").glob("step-*"))] == [
        "step-00000001",
        "step-00000002",
    ]


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_place_that_cannot_be_read_for_good_is_damage(
    run_dir: Path,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
) -> None:
    monkeypatch.setattr(manifest, "hash_file", failing(code, float("inf")))
    monkeypatch.setattr(visible, "VISIBLE_SECONDS", 0.05)
    with caplog.at_level(logging.WARNING, "dtune"):
        found = find_checkpoint(run_dir, "auto", world)
    assert found is not None
    assert found.step == 1
    assert f"({errno.errorcode[code]})" in caplog.text


def test_a_folder_that_cannot_be_listed_is_told_of(
    run_dir: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(path: Path) -> list[int]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr("dtune.checkpoint.reader.list_steps", stale)
    monkeypatch.setattr(visible, "VISIBLE_SECONDS", 0.05)
    with pytest.raises(CheckpointError, match=r"checkpoints.*\(ESTALE\)"):
        find_checkpoint(run_dir, "auto", world)


def test_a_rank_of_another_host_waits_for_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    monkeypatch.setattr(visible, "VISIBLE_SECONDS", 30.0)
    writer = threading.Timer(0.3, file.write_text, ["x: ["])
    writer.start()
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    assert worker.main([str(tmp_path)]) == 2
    writer.join()
    assert "holds no config.yaml" not in capsys.readouterr().err
    monkeypatch.setattr(visible, "VISIBLE_SECONDS", 0.2)
    await_file(tmp_path / "never.yaml")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(visible, "VISIBLE_SECONDS", 3600.0)
    assert worker.main([str(tmp_path / "of one host, and not there")]) == 2
    assert "holds no config.yaml" in capsys.readouterr().err
