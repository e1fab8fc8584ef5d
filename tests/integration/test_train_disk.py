"""A disk that takes no more: what was saved stays good, and the message names the file."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dtune.checkpoint.manifest import find_damage
from dtune.checkpoint.reader import CHECKPOINTS, open_checkpoint
from dtune.cli import main
from dtune.errors import CheckpointError
from dtune.runtime.status import State, read_status
from tests.integration.train_runs import assembled, metrics, settings

KIB = 1024


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let no file grow beyond ``size`` bytes: writing to it fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of its own of ``size`` bytes; the test is skipped where none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system of its own can be mounted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def whole_steps(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that are whole; each published one must be."""
    steps = []
    for path in sorted((run_dir / CHECKPOINTS).glob("step-*")):
        info = open_checkpoint(path)
        assert find_damage(path, info.manifest) == []
        steps.append(info.step)
    return steps


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_save_that_fails_ends_the_run_and_leaves_the_checkpoints_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asynchronous: str
) -> None:
    run_dir = tmp_path / "run"
    argv = settings(
        run_dir,
        "train.max_steps=6",
        "checkpoint.every=2",
        f"checkpoint.asynchronous={asynchronous}",
    )
    with assembled(argv) as it:

        class StopAfterThree:
            def write(self, row: dict[str, str | int | float]) -> None:
                if row["step"] == 3:
                    it.trainer.stop.signal_name = "SIGTERM"

            def close(self) -> None:
                """Nothing is held."""

        it.trainer.sinks = [*it.trainer.sinks, StopAfterThree()]
        assert it.finish()[0] is State.preempted
    assert whole_steps(run_dir) == [2, 3]
    capsys.readouterr()

    with largest_file(64 * KIB):
        assert main(["train", *argv, "resume=auto"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "EFBIG" in said
    assert "rank-00000.safetensors" in said
    status = read_status(run_dir)
    assert status.state is State.config_error
    assert "rank-00000.safetensors" in status.message
    assert whole_steps(run_dir) == [2, 3]
    assert list((run_dir / CHECKPOINTS).glob(".tmp-*")) == []

    assert main(["train", *argv, "resume=auto"]) == 0
    assert [row["step"] for row in metrics(run_dir, "train")] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_to_go_on_after_a_save_that_failed_says_so_and_saves_the_next(
    tmp_path: Path,
) -> None:
    with small_disk(tmp_path / "disk", 16 * KIB * KIB) as disk:
        run_dir, filler = disk / "run", disk / "filler"
        argv = settings(
            run_dir,
            "train.max_steps=8",
            "checkpoint.every=2",
            "checkpoint.keep=1",
            "checkpoint.on_error=go_on",
            "checkpoint.asynchronous=false",
            "log.every=1",
        )
        told: dict[int, str] = {}
        with assembled(argv) as it:

            class Fill:
                """Fills the disk before the save of step 4, and clears it before that of 6."""

                def write(self, row: dict[str, str | int | float]) -> None:
                    told[int(row["step"])] = read_status(run_dir).message
                    if (row["kind"], row["step"]) == ("train", 4):
                        free = shutil.disk_usage(disk).free
                        filler.write_bytes(bytes(free - 16 * KIB))
                    if (row["kind"], row["step"]) == ("train", 6):
                        filler.unlink()

                def close(self) -> None:
                    """Nothing is held."""

            it.trainer.sinks = [*it.trainer.sinks, Fill()]
            assert it.finish()[0] is State.done
        (failed,) = metrics(run_dir, "save_failed")
        assert failed["step"] == 4
        assert "ENOSPC" in str(failed["message"])
        assert told[2] == ""
        assert told[5] == failed["message"]
        # Known after the save of step 6, which was good.
        assert told[7] == ""
        assert whole_steps(run_dir) == [8]
        assert [row["step"] for row in metrics(run_dir, "train")] == list(range(1, 9))


def test_an_export_that_fails_leaves_the_checkpoint_to_export_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    argv = settings(run_dir, "train.max_steps=2", "peft.rank=64", "optim=sgd", "log.every=2")
    assert main(["train", *argv]) == 0
    size = (run_dir / "adapter" / "adapter_model.safetensors").stat().st_size
    for path in (run_dir / "adapter").iterdir():
        path.unlink()
    (run_dir / "adapter").rmdir()
    capsys.readouterr()
    with largest_file(size - KIB):
        assert main(["train", *argv, "resume=auto"]) == 2
    said = capsys.readouterr().err
    assert "adapter could not be exported" in said
    assert "EFBIG" in said or "File too large" in said
    assert not (run_dir / "adapter").exists()
    assert main(["train", *argv, "resume=auto"]) == 0
    assert (run_dir / "adapter" / "adapter_model.safetensors").stat().st_size == size


def test_a_disk_that_fills_up_under_a_run_is_told_with_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", 12 * KIB * KIB) as disk:
        run_dir = disk / "run"
        argv = settings(
            run_dir,
            "train.max_steps=30",
            "checkpoint.every=2",
            "checkpoint.keep=1",
            # So that step 4 is saved before the disk fills up after step 5.
            "checkpoint.asynchronous=false",
        )
        with assembled(argv) as it:
            filler = disk / "filler"

            class Fill:
                """Takes what is left of the disk, byte by byte, after some steps."""

                def write(self, row: dict[str, str | int | float]) -> None:
                    if row["step"] == 5:
                        with filler.open("wb", buffering=0) as file:
                            try:
                                while file.write(bytes(4 * KIB)):
                                    pass
                            except OSError:
                                return

                def close(self) -> None:
                    """Nothing is held."""

            it.trainer.sinks = [*it.trainer.sinks, Fill()]
            with pytest.raises(CheckpointError, match="ENOSPC"):
                it.trainer.fit(evaluate_before=False)
        assert whole_steps(run_dir) == [4]
        capsys.readouterr()
        # Not even room for a status: it is refused at the start, or told and exits 2.
        assert main(["train", *argv, "resume=auto"]) == 2
        assert "Traceback" not in (said := capsys.readouterr().err)
        assert str(disk) in said
        filler.unlink()
        assert main(["train", *argv, "resume=auto"]) == 0
        assert whole_steps(run_dir) == [30]


def test_a_small_disk_is_refused_by_dtune_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", 4 * KIB * KIB) as disk:
        assert main(["train", *settings(disk / "run", "peft=full")]) == 2
        said = capsys.readouterr().err
        assert "GiB free" in said
        assert "checkpoint.keep" in said
        assert not (disk / "run" / CHECKPOINTS).exists()
