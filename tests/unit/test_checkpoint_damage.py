"""Checkpoints that are damaged, crafted or of another run: refused, named, and passed over."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtune.checkpoint.layout import dump_json, hash_bytes
from dtune.checkpoint.reader import find_checkpoint, load_checkpoint
from dtune.errors import CheckpointError, ConfigError
from dtune.runtime.world import World
from tests.unit.checkpoint_runs import IDENTITY, SHAPES, HoldingEngine, write_run

FILES = (
    "manifest.json",
    "index.json",
    "state.json",
    "rank-00000.safetensors",
    "rng/rank-00000.safetensors",
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    write_run(run_dir, world, 1, 2)
    return run_dir


@pytest.fixture
def run_dir(written: Path, tmp_path: Path) -> Path:
    """A run folder of its own with steps 1 and 2, of which a test may damage the second."""
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "step-00000002"


def chosen_step(run_dir: Path, world: World) -> int:
    info = find_checkpoint(run_dir, "auto", world)
    assert info is not None
    return info.step


@pytest.mark.parametrize("name", FILES)
def test_flipped_bit_anywhere_is_found_and_the_file_named(
    run_dir: Path, newest: Path, world: World, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    file = newest / name
    whole = file.read_bytes()
    places = [0, 1, 7, 8, len(whole) - 1, *random.Random(name).sample(range(len(whole)), 15)]
    for place in places:
        for bit in (0, 3, 5, 7):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            file.write_bytes(damaged)
            caplog.clear()
            with caplog.at_level(logging.WARNING, "dtune"):
                assert chosen_step(run_dir, world) == 1, (place, bit)
            assert str(file) in caplog.text
            assert "passed over" in caplog.text
    file.write_bytes(whole)
    assert chosen_step(run_dir, world) == 2


def test_of_a_hundred_random_flips_over_all_files_a_hundred_are_found(
    run_dir: Path, newest: Path, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = random.Random(20)
    contents = {name: (newest / name).read_bytes() for name in FILES}
    places = [(name, at) for name, data in contents.items() for at in range(len(data))]
    found = 0
    for name, at in chosen.sample(places, 100):
        damaged = bytearray(contents[name])
        damaged[at] ^= 1 << chosen.randrange(8)
        (newest / name).write_bytes(damaged)
        caplog.clear()
        found += chosen_step(run_dir, world) == 1 and str(newest / name) in caplog.text
        (newest / name).write_bytes(contents[name])
    assert found == 100
    assert chosen_step(run_dir, world) == 2


def test_past_several_bad_ones_a_good_one_is_gone_on_from_and_the_bad_ones_are_kept(
    tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_run(tmp_path, world, 1, 2, 3, 4)
    harms: dict[str, Callable[[Path], None]] = {
        "rank-00000.safetensors": truncate,
        "state.json": Path.unlink,
        "manifest.json": empty,
    }
    for step, (name, harm) in enumerate(harms.items(), start=2):
        harm(folder / f"step-{step:08d}" / name)
    with caplog.at_level(logging.WARNING, "dtune"):
        assert chosen_step(tmp_path, world) == 1
    skipped = [record.message for record in caplog.records if "passed over" in record.message]
    assert len(skipped) == 3
    for step, said, name in zip((4, 3, 2), skipped, reversed(harms), strict=True):
        assert f"step-{step:08d} is damaged" in said
        assert name in said
    assert sorted(path.name for path in folder.glob("step-*")) == [
        f"step-{step:08d}" for step in (1, 2, 3, 4)
    ]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b" ")


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [truncate, lengthen, empty, Path.unlink])
def test_changed_file_is_found_and_the_folder_kept(
    run_dir: Path,
    newest: Path,
    world: World,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[Path], None],
) -> None:
    damage(newest / name)
    assert chosen_step(run_dir, world) == 1
    assert str(newest / name) in caplog.text
    assert newest.is_dir()


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "rank-00000.safetensors"])
def test_file_of_another_step_is_refused(
    run_dir: Path, newest: Path, world: World, name: str
) -> None:
    shutil.copy(newest.with_name("step-00000001") / name, newest)
    assert chosen_step(run_dir, world) == 1


def test_whole_checkpoint_under_the_name_of_another_step_is_refused(
    run_dir: Path, newest: Path, world: World
) -> None:
    shutil.copytree(newest, newest.with_name("step-00000003"))
    info = find_checkpoint(run_dir, "auto", world)
    assert info is not None
    assert info.path == newest


def test_file_that_is_not_of_the_checkpoint_is_named_and_ignored(
    run_dir: Path, newest: Path, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    (newest / "rng" / "notes.txt").write_text("mine")
    assert chosen_step(run_dir, world) == 2
    assert "rng/notes.txt" in caplog.text


def test_if_all_are_damaged_nothing_is_started_anew(
    run_dir: Path, newest: Path, world: World
) -> None:
    for step in (1, 2):
        truncate(newest.with_name(f"step-{step:08d}") / "state.json")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole.*00000002.*00001"):
        find_checkpoint(run_dir, "auto", world)


def test_damaged_step_asked_for_by_path_is_refused(
    run_dir: Path, newest: Path, world: World
) -> None:
    (newest / "rank-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors is missing"):
        find_checkpoint(run_dir, str(newest), world)


def test_resume_chooses_by_path(written: Path, tmp_path: Path, world: World) -> None:
    folder = written / "checkpoints"
    asked = {str(written): 2, str(folder): 2, str(folder / "step-00000001"): 1}
    for path, step in asked.items():
        info = find_checkpoint(tmp_path, path, world)
        assert info is not None
        assert info.step == step
    assert find_checkpoint(written, "false", world) is None
    assert find_checkpoint(tmp_path, "auto", world) is None
    for path in (tmp_path, tmp_path / "step-00000001", tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="holds no checkpoint"):
            find_checkpoint(tmp_path / "new", str(path), world)


def reseal(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest as one could who knows the format."""
    body = json.loads((path / "manifest.json").read_bytes())["body"]
    change(body)
    outer = {"body": body, "checksum": hash_bytes(dump_json(body))}
    (path / "manifest.json").write_bytes(dump_json(outer))


def reseal_index(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((path / "index.json").read_bytes())
    change(index)
    data = dump_json(index)
    (path / "index.json").write_bytes(data)
    fact = {"size": len(data), "digest": hash_bytes(data)}
    reseal(path, lambda body: body["files"].update({"index.json": fact}))


@pytest.mark.parametrize("name", ["../other", "/etc/hostname", "rng/../../x", "a.pt", "rank-1.pt"])
def test_name_that_leads_elsewhere_is_refused(
    run_dir: Path, newest: Path, world: World, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    fact = {"size": 1, "digest": "0"}
    reseal(newest, lambda body: body["files"].update({name: fact}))
    assert chosen_step(run_dir, world) == 1
    assert repr(name) in caplog.text


def test_index_that_leads_elsewhere_is_refused(
    run_dir: Path, newest: Path, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    reseal_index(newest, lambda index: index["param/scale"].update(ranges=[["../x", 0, 1]]))
    assert chosen_step(run_dir, world) == 1
    assert "'../x'" in caplog.text


def test_file_that_the_index_needs_and_the_manifest_lacks_is_refused(
    run_dir: Path, newest: Path, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    ranges = [["rank-00009.safetensors", 0, 1]]
    reseal_index(newest, lambda index: index["param/scale"].update(ranges=ranges))
    assert chosen_step(run_dir, world) == 1
    assert "rank-00009.safetensors" in caplog.text


def test_missing_range_is_refused_and_the_tensor_named(
    run_dir: Path, newest: Path, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    reseal_index(newest, lambda index: index["param/layers.1.bias"]["ranges"][0].__setitem__(2, 5))
    assert chosen_step(run_dir, world) == 1
    assert "param/layers.1.bias has 7 elements, and none are stored from 5 on" in caplog.text


def test_missing_shard_of_a_larger_world_is_refused(
    run_dir: Path, newest: Path, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    reseal(newest, lambda body: body.update(world_size=2))
    assert chosen_step(run_dir, world) == 1
    assert "rank-00001.safetensors" in caplog.text


@pytest.mark.parametrize("resume", ["auto", "path"])
def test_newer_format_is_refused_with_what_to_do_and_not_passed_over(
    run_dir: Path, newest: Path, world: World, resume: str
) -> None:
    """Going on from the step before would do anew, and differently, what a newer dtune has done."""
    reseal(newest, lambda body: body.update(version=2, written_by="9.1"))
    with pytest.raises(CheckpointError) as refused:
        find_checkpoint(run_dir, str(newest) if resume == "path" else resume, world)
    for part in (str(newest), "format version 2, written by dtune 9.1", "Update dtune", "resume="):
        assert part in str(refused.value)
    info = find_checkpoint(run_dir, str(newest.with_name("step-00000001")), world)
    assert info is not None
    assert info.step == 1


def test_of_a_newer_format_that_is_damaged_the_damage_counts(
    run_dir: Path, newest: Path, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = (newest / "manifest.json").read_bytes()
    (newest / "manifest.json").write_bytes(manifest.replace(b'"version":1', b'"version":2'))
    assert chosen_step(run_dir, world) == 1
    assert "its checksum does not fit" in caplog.text


def refused_load(run_dir: Path, world: World, **other: Any) -> str:
    info = find_checkpoint(run_dir, "auto", world)
    assert info is not None
    engine = HoldingEngine(world, shapes=other.pop("shapes", SHAPES))
    with pytest.raises(ConfigError) as refused:
        load_checkpoint(info, engine=engine, identity=replace(IDENTITY, **other), world=world)
    assert engine.holds(0)
    return str(refused.value)


def test_checkpoint_of_another_run_is_refused_with_what_differs(
    written: Path, world: World
) -> None:
    settings = {"optim.name": "sgd", "seed": 1, "peft.targets": ["q_proj"]}
    said = refused_load(written, world, model="other@2", settings=settings)
    assert "model was 'tiny@1' and is 'other@2'" in said
    assert "optim.name was 'adamw' and is 'sgd'" in said
    assert "seed was not set and is 1" in said
    assert "peft.targets" not in said
    assert "data was 'data@1'" in refused_load(written, world, data="x")


def test_checkpoint_of_another_model_is_refused_with_names_and_shapes(
    written: Path, world: World
) -> None:
    shapes = {**SHAPES, "param/layers.0.weight": (6, 4), "param/new": (2,)}
    said = refused_load(written, world, shapes=shapes)
    assert "layers.0.weight is [6, 5] in the checkpoint and [6, 4] here" in said
    assert "new is absent in the checkpoint and [2] here" in said


def test_checkpoint_of_another_optimizer_is_refused_with_the_tensor(
    written: Path, world: World
) -> None:
    said = refused_load(written, world, shapes={**SHAPES, "exp_avg_sq/layers.1.bias": (7,)})
    assert "exp_avg_sq/layers.1.bias is absent in the checkpoint" in said
    assert "another optimizer" in said


def test_another_engine_may_go_on(written: Path, world: World) -> None:
    info = find_checkpoint(written, "auto", world)
    assert info is not None
    engine = HoldingEngine(world)
    identity = replace(IDENTITY, engine="another")
    load_checkpoint(info, engine=engine, identity=identity, world=world)
    assert engine.holds(2)
