"""Checkpoints: what is saved, published and kept, on one process."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import dtune.checkpoint
from dtune.checkpoint.reader import CheckpointSource, find_checkpoint, load_checkpoint
from dtune.checkpoint.retention import plan_removals
from dtune.checkpoint.schema import CheckpointConfig
from dtune.checkpoint.writer import Checkpointer
from dtune.errors import CheckpointError
from dtune.runtime.world import World
from tests.contracts.small_models import limited_file_size
from tests.unit.checkpoint_runs import (
    IDENTITY,
    SHAPES,
    HoldingEngine,
    expected,
    names_in,
    save_step,
    write_run,
)

# Larger than every other file of the checkpoint, so that a limit hits this one.
LARGE = {"param/large": (40_000,)}


def read_name(folder: Path, name: str) -> str:
    return (folder / name).read_text().strip()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_was_saved_comes_back(tmp_path: Path, world: World, asynchronous: bool) -> None:
    config = CheckpointConfig(asynchronous=asynchronous)
    with Checkpointer(tmp_path / "checkpoints", config, world) as checkpointer:
        save_step(checkpointer, HoldingEngine(world), 7)
    info = find_checkpoint(tmp_path, "auto", world)
    assert info is not None
    assert info.step == 7
    assert info.extra == {"position": 7, "best": 0.5, "history": [1.0, 1 / 3]}
    engine = HoldingEngine(world)
    assert not engine.holds(7)
    load_checkpoint(info, engine=engine, identity=IDENTITY, world=world)
    assert engine.holds(7)
    assert not engine.holds(8)


def test_every_range_can_be_read(tmp_path: Path, world: World) -> None:
    write_run(tmp_path, world, 3)
    info = find_checkpoint(tmp_path, "auto", world)
    assert info is not None
    source = CheckpointSource(info)
    assert set(source.names()) == set(SHAPES)
    assert "param/other" not in source
    for name, shape in SHAPES.items():
        whole = expected(name, 3)
        assert source.shape(name) == shape
        for start in range(whole.numel() + 1):
            for stop in range(start, whole.numel() + 1):
                part = source.read(name, start, stop)
                assert part.dtype == whole.dtype
                assert torch.equal(part, whole[start:stop])


def test_names_point_at_published_steps_and_old_ones_go(tmp_path: Path, world: World) -> None:
    folder = write_run(tmp_path, world, 1, 2, 3, 4, keep=2, best=2)
    assert read_name(folder, "LATEST") == "step-00000004"
    assert read_name(folder, "BEST") == "step-00000002"
    steps = {f"step-{step:08d}" for step in (2, 3, 4)}
    assert names_in(folder) == steps | {"LATEST", "BEST"}


@pytest.mark.parametrize(
    ("steps", "newest", "keep", "best", "removed"),
    [
        ([1, 2, 3], 3, 1, -1, [1, 2]),
        ([1, 2, 3], 3, 2, 1, []),
        ([1, 2, 3], 3, 5, -1, []),
        ([1, 2, 9], 2, 1, -1, [1]),
        ([2, 9], 2, 1, -1, []),
    ],
)
def test_retention_keeps_the_newest_and_the_best_and_never_none(
    steps: list[int], newest: int, keep: int, best: int, removed: list[int]
) -> None:
    assert plan_removals(steps, newest=newest, keep=keep, best_step=best) == removed


def test_best_of_an_earlier_process_is_kept_whatever_the_file_says(
    tmp_path: Path, world: World
) -> None:
    folder = write_run(tmp_path, world, 1, 2, best=1)
    # As if the process had died between publishing step 2, its best, and naming it.
    config = CheckpointConfig(keep=1)
    with Checkpointer(folder, config, world, best_step=2) as checkpointer:
        save_step(checkpointer, HoldingEngine(world), 3)
    assert names_in(folder) == {"step-00000002", "step-00000003", "LATEST", "BEST"}
    assert read_name(folder, "BEST") == "step-00000002"


def test_whole_step_that_is_there_is_never_written_again(tmp_path: Path, world: World) -> None:
    folder = write_run(tmp_path, world, 1)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    inode = (folder / "step-00000001").stat().st_ino
    write_run(tmp_path, world, 1)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert (folder / "step-00000001").stat().st_ino == inode


def test_damaged_step_is_kept_aside_and_written_anew(tmp_path: Path, world: World) -> None:
    folder = write_run(tmp_path, world, 1)
    (folder / "step-00000001" / "state.json").write_bytes(b"{}")
    write_run(tmp_path, world, 1)
    aside = [name for name in names_in(folder) if "damaged" in name]
    assert len(aside) == 1
    assert (folder / aside[0] / "state.json").read_bytes() == b"{}"
    info = find_checkpoint(tmp_path, "auto", world)
    assert info is not None
    assert info.path.name == "step-00000001"


def test_leftovers_of_dead_attempts_are_swept_at_start(tmp_path: Path, world: World) -> None:
    folder = write_run(tmp_path, world, 1)
    (folder / ".tmp-step-00000002-abcd" / "rng").mkdir(parents=True)
    (folder / ".tmp-LATEST-abcd").write_text("step-00000002")
    Checkpointer(folder, CheckpointConfig(), world).close()
    assert names_in(folder) == {"step-00000001", "LATEST"}


def test_training_goes_on_while_a_save_is_written(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real = threading.Event(), os.fsync

    def fsync(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert gate.wait(60)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    engine = HoldingEngine(world)
    folder = tmp_path / "checkpoints"
    with Checkpointer(folder, CheckpointConfig(), world) as checkpointer:
        save_step(checkpointer, engine, 1)
        for values in engine.values.values():
            values.fill_(99)
        assert not (folder / "LATEST").exists()
        assert not (folder / "step-00000001").exists()
        gate.set()
        save_step(checkpointer, engine, 2)
        assert read_name(folder, "LATEST") >= "step-00000001"
    assert read_name(folder, "LATEST") == "step-00000002"
    for step in (1, 2):
        info = find_checkpoint(tmp_path, str(folder / f"step-{step:08d}"), world)
        assert info is not None
        load_checkpoint(info, engine=engine, identity=IDENTITY, world=world)
        assert engine.holds(step)


def test_full_disk_is_reported_at_the_next_call_and_leaves_the_earlier_checkpoint(
    tmp_path: Path, world: World
) -> None:
    folder = tmp_path / "checkpoints"
    engine = HoldingEngine(world, shapes=LARGE)
    checkpointer = Checkpointer(folder, CheckpointConfig(), world)
    save_step(checkpointer, engine, 1)
    checkpointer.wait()
    with limited_file_size(100_000):
        save_step(checkpointer, engine, 2)
        with pytest.raises(CheckpointError) as failed:
            save_step(checkpointer, engine, 3)
    said = str(failed.value)
    assert all(part in said for part in ("step 2", "rank-00000", "File too large", "EFBIG"))
    assert names_in(folder) == {"step-00000001", "LATEST"}
    assert read_name(folder, "LATEST") == "step-00000001"
    save_step(checkpointer, engine, 4)
    checkpointer.close()
    assert read_name(folder, "LATEST") == "step-00000004"
    info = find_checkpoint(tmp_path, "auto", world)
    assert info is not None
    load_checkpoint(info, engine=engine, identity=IDENTITY, world=world)
    assert engine.holds(4)


def test_small_file_system_that_is_full_says_so(tmp_path: Path, world: World) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        folder = tmp_path / "checkpoints"
        engine = HoldingEngine(world, shapes=LARGE)
        with Checkpointer(folder, CheckpointConfig(asynchronous=False), world) as checkpointer:
            save_step(checkpointer, engine, 1)
            with pytest.raises(CheckpointError, match=r"No space left on device \(ENOSPC\)"):
                save_step(checkpointer, engine, 2)
        assert names_in(folder) == {"step-00000001", "LATEST"}
        assert find_checkpoint(tmp_path, "auto", world) is not None
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_folder_that_cannot_be_made_is_named(tmp_path: Path, world: World) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file/checkpoints: Not a directory"):
        Checkpointer(tmp_path / "file" / "checkpoints", CheckpointConfig(), world)


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        *torch.rand(3).tolist(),
        *torch.nn.functional.dropout(torch.ones(8)).tolist(),
    ]


def test_random_numbers_go_on_where_they_were(tmp_path: Path, world: World) -> None:
    draw()  # leaves half a pair of normal values in Python's and NumPy's generators
    write_run(tmp_path, world, 1)
    after_save = draw()
    assert draw() != after_save
    info = find_checkpoint(tmp_path, "auto", world)
    assert info is not None
    load_checkpoint(info, engine=HoldingEngine(world), identity=IDENTITY, world=world)
    assert draw() == after_save


def test_nothing_is_pickled(tmp_path: Path, world: World) -> None:
    for path in Path(dtune.checkpoint.__file__).parent.glob("*.py"):
        if path.name == "universal.py":
            continue  # DeepSpeed's files are pickles, of which it reads tensors and plain values.
        assert not re.search(r"pickle|torch\.load|torch\.save", path.read_text()), path
    folder = write_run(tmp_path, world, 1)
    files = [path for path in (folder / "step-00000001").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
