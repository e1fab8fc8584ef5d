"""Saves that fail: nothing is published, what was there stays, and the run gets to know."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from dtune.checkpoint import retention
from dtune.checkpoint.reader import CheckpointSource, find_checkpoint, load_checkpoint
from dtune.checkpoint.schema import CheckpointConfig, OnError
from dtune.checkpoint.writer import Checkpointer
from dtune.errors import CheckpointError
from dtune.runtime import tensors
from dtune.runtime.files import TEMPORARY
from dtune.runtime.world import World
from tests.contracts.small_models import limited_file_size
from tests.unit.checkpoint_runs import (
    IDENTITY,
    HoldingEngine,
    names_in,
    save_step,
    write_run,
)

# Larger than every other file of the checkpoint.
LARGE = {"param/large": (40_000,)}
LARGEST_FILE = 160_000


def loaded(run_dir: Path, world: World, shapes: dict[str, tuple[int, ...]] = LARGE) -> int:
    """The step that a resume finds, whose values are all there."""
    info = find_checkpoint(run_dir, "auto", world)
    assert info is not None
    engine = HoldingEngine(world, shapes=shapes)
    load_checkpoint(info, engine=engine, identity=IDENTITY, world=world)
    assert engine.holds(info.step)
    return info.step


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_is_full_at_any_byte_of_the_largest_file_leaves_the_one_before(
    tmp_path: Path, world: World, asynchronous: bool
) -> None:
    folder = tmp_path / "checkpoints"
    engine = HoldingEngine(world, shapes=LARGE)
    config = CheckpointConfig(asynchronous=asynchronous)
    with Checkpointer(folder, config, world) as checkpointer:
        save_step(checkpointer, engine, 1)
        checkpointer.wait()
    (size,) = (path.stat().st_size for path in folder.glob("step-*/rank-00000.safetensors"))
    assert size > LARGEST_FILE
    # The header is written first, then the values.
    for limit in (0, 1, 7, 8, 100, 1000, size // 3, size // 2, size - 4096, size - 1):
        with limited_file_size(limit):
            checkpointer = Checkpointer(folder, config, world)
            assert "File too large (EFBIG)" in said_of_save(checkpointer, engine, 2), limit
            checkpointer.close()
        assert names_in(folder) == {"step-00000001", "LATEST"}, limit
    assert loaded(tmp_path, world) == 1
    with Checkpointer(folder, config, world) as checkpointer:
        save_step(checkpointer, engine, 2)
    assert loaded(tmp_path, world) == 2


def test_a_disk_that_is_full_at_any_page_of_a_save_leaves_the_one_before(
    tmp_path: Path, world: World
) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        folder, filler = tmp_path / "checkpoints", tmp_path / "filler"
        engine = HoldingEngine(world, shapes=LARGE)
        config = CheckpointConfig(asynchronous=False, keep=1)
        with Checkpointer(folder, config, world) as checkpointer:
            save_step(checkpointer, engine, 1)
            outcomes = set()
            # Pages of 4 KiB left for a save of 45: from none at all to all that it takes.
            for pages in (0, 1, 2, 3, 20, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 60):
                leave_free(filler, pages * 4096)
                said = said_of_save(checkpointer, engine, 2)
                filler.unlink()
                assert not said or "No space left on device (ENOSPC)" in said, pages
                outcomes.add("failed" if said else "saved")
                if not said:
                    break
                assert not list(folder.glob(f"{TEMPORARY}step*")), pages
                assert loaded(tmp_path, world) in (1, 2)
            assert outcomes == {"failed", "saved"}
            assert loaded(tmp_path, world) == 2
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def said_of_save(checkpointer: Checkpointer, engine: HoldingEngine, step: int) -> str:
    """What a save fails with; empty where it does not."""
    try:
        save_step(checkpointer, engine, step)
        checkpointer.wait()
    except CheckpointError as error:
        return str(error)
    return ""


def leave_free(filler: Path, size: int) -> None:
    """Fill the disk up to so many bytes."""
    free = shutil.disk_usage(filler.parent).free
    with filler.open("wb") as file:
        file.write(bytes(max(0, free - size)))


def fail_writes(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Let the disk refuse every tensor."""

    def put(self: tensors.TensorWriter, data: memoryview) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tensors.TensorWriter, "_put", put)


def settle(checkpointer: Checkpointer) -> None:
    deadline = time.monotonic() + 60
    while not checkpointer.is_settled():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_an_error_of_the_writing_thread_is_known_at_the_next_step(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    checkpointer = Checkpointer(folder, CheckpointConfig(), world)
    assert checkpointer.is_settled()
    with monkeypatch.context() as patch:
        fail_writes(patch, errno.EIO)
        save_step(checkpointer, HoldingEngine(world), 1)
        with pytest.raises(CheckpointError, match=r"step 1 was not saved .*\(EIO\)"):
            settle(checkpointer)
    assert names_in(folder) == set()
    # Told once.
    assert checkpointer.is_settled()
    checkpointer.close()


def test_where_the_run_is_to_go_on_the_next_save_is_as_good_as_any(
    tmp_path: Path,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "checkpoints"
    engine = HoldingEngine(world)
    config = CheckpointConfig(on_error=OnError.go_on)
    with Checkpointer(folder, config, world) as checkpointer:
        save_step(checkpointer, engine, 1, is_best=True)
        checkpointer.wait()
        with monkeypatch.context() as patch:
            fail_writes(patch, errno.ENOSPC)
            save_step(checkpointer, engine, 2, is_best=True)
            settle(checkpointer)
        assert checkpointer.failure is not None
        assert (checkpointer.failure.step, "ENOSPC" in checkpointer.failure.message) == (2, True)
        assert "ENOSPC" in caplog.text
        assert "The run goes on" in caplog.text
        save_step(checkpointer, engine, 3)
        settle(checkpointer)
        assert checkpointer.failure is None
    # The best that there is, and not the one that was not saved.
    assert (folder / "BEST").read_text() == "step-00000001\n"
    assert names_in(folder) == {"step-00000001", "step-00000003", "LATEST", "BEST"}
    engine = HoldingEngine(world)
    info = find_checkpoint(tmp_path, "auto", world)
    assert info is not None
    load_checkpoint(info, engine=engine, identity=IDENTITY, world=world)
    assert engine.holds(3)


def test_a_run_never_ends_well_without_its_last_checkpoint(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CheckpointConfig(on_error=OnError.go_on)
    checkpointer = Checkpointer(tmp_path / "checkpoints", config, world)
    fail_writes(monkeypatch, errno.ENOSPC)
    save_step(checkpointer, HoldingEngine(world), 1)
    with pytest.raises(CheckpointError, match="ENOSPC"):
        checkpointer.close()


def test_a_save_waits_for_the_one_before_and_the_end_for_the_last(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, real = threading.Event(), os.fsync

    def fsync(descriptor: int) -> None:
        assert gate.wait(60)
        real(descriptor)

    engine, folder = HoldingEngine(world), tmp_path / "checkpoints"
    with Checkpointer(folder, CheckpointConfig(), world) as checkpointer:
        monkeypatch.setattr(os, "fsync", fsync)
        save_step(checkpointer, engine, 1)
        assert not checkpointer.is_settled()
        assert names_in(folder) <= {path.name for path in folder.glob(f"{TEMPORARY}*")}
        threading.Timer(0.2, gate.set).start()
        # Waits for the first, whose values are its own.
        save_step(checkpointer, engine, 2)
        assert (folder / "step-00000001").is_dir()
    assert names_in(folder) == {"step-00000001", "step-00000002", "LATEST"}
    for step in (1, 2):
        info = find_checkpoint(tmp_path, str(folder / f"step-{step:08d}"), world)
        assert info is not None
        load_checkpoint(info, engine=engine, identity=IDENTITY, world=world)
        assert engine.holds(step)


@pytest.mark.parametrize("read_back", [True, False])
def test_a_disk_that_does_not_hold_what_was_written_is_noticed_before_publishing(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, read_back: bool
) -> None:
    folder = write_run(tmp_path, world, 1)
    real = tensors.TensorWriter.__exit__

    def lose_a_bit(self: tensors.TensorWriter, *outcome: object) -> None:
        real(self, *outcome)
        data = bytearray(self.path.read_bytes())
        data[-1] ^= 1
        self.path.write_bytes(data)

    monkeypatch.setattr(tensors.TensorWriter, "__exit__", lose_a_bit)
    config = CheckpointConfig(keep=1, read_back=read_back)
    checkpointer = Checkpointer(folder, config, world)
    save_step(checkpointer, HoldingEngine(world), 2)
    if not read_back:
        checkpointer.close()
        assert names_in(folder) == {"step-00000002", "LATEST"}
        with pytest.raises(CheckpointError, match="is whole"):
            find_checkpoint(tmp_path, "auto", world)
        return
    with pytest.raises(CheckpointError, match="does not hold what was written"):
        checkpointer.close()
    # The good one before it has not been deleted for its sake.
    assert names_in(folder) == {"step-00000001", "LATEST"}


def test_an_old_checkpoint_that_cannot_be_deleted_is_only_warned_of(
    tmp_path: Path,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    folder = write_run(tmp_path, world, 1)
    monkeypatch.setattr(retention, "remove_tree", refuse)
    write_run(tmp_path, world, 2, keep=1)
    assert names_in(folder) == {"step-00000001", "step-00000002", "LATEST"}
    assert "step 1 cannot be removed: [Errno 13]" in caplog.text
    monkeypatch.undo()
    write_run(tmp_path, world, 3, keep=1)
    assert names_in(folder) == {"step-00000003", "LATEST"}


def test_who_reads_an_old_checkpoint_is_not_cut_off_by_its_deletion(
    tmp_path: Path, world: World
) -> None:
    write_run(tmp_path, world, 1)
    info = find_checkpoint(tmp_path, "auto", world)
    assert info is not None
    source = CheckpointSource(info)
    before = {name: source.read(name, 0, 1) for name in ("param/scale", "param/layers.1.bias")}
    folder = write_run(tmp_path, world, 2, keep=1)
    assert not (folder / "step-00000001").exists()
    for name, value in before.items():
        assert torch.equal(source.read(name, 0, 1), value)


def test_a_linked_leftover_is_removed_and_not_what_it_leads_to(
    tmp_path: Path, world: World
) -> None:
    folder = write_run(tmp_path, world, 1)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis").write_text("mine")
    (folder / f"{TEMPORARY}deleted-step-00000000-ab").symlink_to(elsewhere)
    write_run(tmp_path, world, 2)
    assert names_in(folder) == {"step-00000001", "step-00000002", "LATEST"}
    assert (elsewhere / "thesis").read_text() == "mine"


def test_a_clock_that_jumps_changes_nothing(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path, world, 1)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    write_run(tmp_path, world, 2)
    os.utime(folder / "step-00000002", (0, 0))
    os.utime(folder / "step-00000002" / "manifest.json", (0, 0))
    info = find_checkpoint(tmp_path, "auto", world)
    assert info is not None
    assert info.step == 2


def test_a_run_whose_folder_another_has_taken_publishes_nothing(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after standing still for so long that it was taken for dead."""
    folder = write_run(tmp_path, world, 1)
    monkeypatch.setattr("dtune.checkpoint.publish.check_held", lambda run_dir: "process 7 on n2")
    checkpointer = Checkpointer(folder, CheckpointConfig(), world)
    save_step(checkpointer, HoldingEngine(world), 2)
    with pytest.raises(CheckpointError, match="in use by process 7 on n2"):
        checkpointer.close()
    assert names_in(folder) == {"step-00000001", "LATEST"}


@pytest.fixture(autouse=True)
def _messages_reach_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("dtune"), "propagate", True)
