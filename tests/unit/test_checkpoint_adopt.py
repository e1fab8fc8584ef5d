"""Going on from a checkpoint: which one, what becomes of the others, and the room for more."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtune.checkpoint import space
from dtune.checkpoint.adopt import Held, adopt_checkpoint
from dtune.checkpoint.reader import CheckpointInfo, find_checkpoint
from dtune.errors import ConfigError
from dtune.runtime.world import World
from tests.unit.checkpoint_runs import names_in, write_run


def found_in(run_dir: Path, resume: str, world: World) -> CheckpointInfo:
    info = find_checkpoint(run_dir, resume, world)
    assert info is not None
    return info


def named(folder: Path, name: str) -> str:
    return (folder / name).read_text().strip()


def test_steps_after_the_one_that_is_gone_on_from_are_set_aside(
    tmp_path: Path, world: World
) -> None:
    folder = write_run(tmp_path, world, 1, 2, 3, 4, best=3)
    info = found_in(tmp_path, str(folder / "step-00000002"), world)
    held = adopt_checkpoint(info, folder, best_step=1, world=world)
    assert held == Held(saved_step=2, best_step=1)
    assert (named(folder, "LATEST"), named(folder, "BEST")) == ("step-00000002", "step-00000001")
    aside = {name for name in names_in(folder) if ".superseded-" in name}
    assert {name.partition(".")[0] for name in aside} == {"step-00000003", "step-00000004"}
    assert names_in(folder) - aside == {"step-00000001", "step-00000002", "LATEST", "BEST"}
    # What is written anew is what is found then; what was set aside is kept as it was.
    write_run(tmp_path, world, 3)
    assert found_in(tmp_path, "auto", world).step == 3
    assert aside < names_in(folder)


def test_a_best_that_was_pruned_is_best_no_longer(tmp_path: Path, world: World) -> None:
    folder = write_run(tmp_path, world, 3, 4, best=4)
    info = found_in(tmp_path, str(folder / "step-00000003"), world)
    assert adopt_checkpoint(info, folder, best_step=2, world=world).best_step == -1
    assert not (folder / "BEST").exists()


@pytest.mark.parametrize(("best_step", "kept"), [(1, -1), (2, 2)])
def test_the_best_of_another_folder_counts_only_where_it_is_gone_on_from(
    tmp_path: Path, world: World, best_step: int, kept: int
) -> None:
    old = write_run(tmp_path / "old", world, 1, 2, best=1)
    before = names_in(old)
    info = found_in(tmp_path / "new", str(tmp_path / "old"), world)
    held = adopt_checkpoint(
        info, tmp_path / "new" / "checkpoints", best_step=best_step, world=world
    )
    assert held == Held(saved_step=-1, best_step=kept)
    assert names_in(old) == before


def test_a_path_elsewhere_is_only_where_a_run_begins(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write_run(tmp_path / "old", world, 1, 2)
    assert found_in(tmp_path / "new", str(old / "step-00000001"), world).path.parent == old
    own = write_run(tmp_path / "new", world, 5, 6)
    for path in (tmp_path / "old", old / "step-00000001", tmp_path / "gone"):
        assert found_in(tmp_path / "new", str(path), world).path == own / "step-00000006"
    # A step of its own is gone back to, however it is written.
    monkeypatch.chdir(own.parent)
    assert found_in(tmp_path / "new", "checkpoints/step-00000005", world).step == 5


class Disk:
    """What is left of a disk."""

    free = 0


def test_room_is_counted_with_what_the_run_has_already(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 checkpoints of 12 bytes a parameter, and the export."""

    def check(free: int, **more: int) -> None:
        monkeypatch.setattr(Disk, "free", free)
        asked = {"trained": 100, "state_bytes": 8, "keep": 2, "exported_bytes": 200} | more
        space.check_space(tmp_path, **asked, exports=["model"], world=world)

    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: Disk)
    check(5000)
    with pytest.raises(ConfigError, match=r"checkpoint\.keep"):
        check(4999)
    for path, size in (("checkpoints/step-00000001/rng/a", 1200), ("model/b", 200)):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_bytes(bytes(size))
    check(3600)
    with pytest.raises(ConfigError, match="of its own"):
        check(3599)
    # What was set aside stays where it is.
    (tmp_path / "checkpoints" / "step-00000001").rename(
        tmp_path / "checkpoints" / "step-00000001.superseded-ab"
    )
    with pytest.raises(ConfigError):
        check(4799)
    check(4800)
