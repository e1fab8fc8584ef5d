"""Checkpoints that were crafted by somebody who knows the format: refused, and nothing is run."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dtune.checkpoint.layout import dump_json, hash_bytes
from dtune.checkpoint.reader import find_checkpoint, load_checkpoint
from dtune.errors import CheckpointError
from dtune.runtime.world import World
from tests.unit.checkpoint_runs import IDENTITY, HoldingEngine, write_run
from tests.unit.malicious import is_armed, pickled, saved_by_torch

RANK, RNG = "rank-00000.safetensors", "rng/rank-00000.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    write_run(run_dir, world, 1)
    return run_dir


@pytest.fixture
def step(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(logging.getLogger("dtune"), "propagate", True)
    shutil.copytree(written, tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "step-00000001"


def put(step: Path, name: str, data: bytes) -> None:
    """Write a file, and let the manifest vouch for it."""
    (step / name).write_bytes(data)
    body = json.loads((step / "manifest.json").read_bytes())["body"]
    body["files"][name] = {"size": len(data), "digest": hash_bytes(data)}
    outer = {"body": body, "checksum": hash_bytes(dump_json(body))}
    (step / "manifest.json").write_bytes(dump_json(outer))


def resume(step: Path, world: World) -> None:
    info = find_checkpoint(step.parents[1], "auto", world)
    assert info is not None
    load_checkpoint(info, engine=HoldingEngine(world), identity=IDENTITY, world=world)


def test_the_payloads_would_run_where_they_are_read_without_care(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    assert is_armed(pickled(canary), canary)
    assert is_armed(saved_by_torch(canary), canary)


@pytest.mark.parametrize("name", [RANK, RNG, "index.json", "state.json"])
@pytest.mark.parametrize("craft", [pickled, saved_by_torch])
def test_pickle_in_the_place_of_a_file_is_refused_and_the_file_named(
    step: Path, tmp_path: Path, world: World, name: str, craft: Callable[[Path], bytes]
) -> None:
    canary = tmp_path / "canary"
    put(step, name, craft(canary))
    with pytest.raises(CheckpointError) as refused:
        resume(step, world)
    assert str(step) in str(refused.value)
    assert not canary.exists()


def test_pickle_in_the_place_of_the_manifest_is_refused(
    step: Path, tmp_path: Path, world: World
) -> None:
    (step / "manifest.json").write_bytes(pickled(tmp_path / "canary"))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        resume(step, world)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", [".metadata", "optimizer.pt", "rng/rank-00000.pkl", "hook.py"])
def test_file_that_the_format_does_not_have_is_named_and_never_read(
    step: Path, tmp_path: Path, world: World, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    code = f"import os; os.system('touch {tmp_path / 'canary'}')".encode()
    (step / name).write_bytes(code if name == "hook.py" else pickled(tmp_path / "canary"))
    resume(step, world)
    assert name in caplog.text
    assert not (tmp_path / "canary").exists()
    # And with a manifest that vouches for it.
    put(step, name, (step / name).read_bytes())
    with pytest.raises(CheckpointError, match="is not the name of a file of a checkpoint"):
        resume(step, world)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["manifest.json", "index.json", "state.json", RANK, RNG, "rng"])
def test_link_out_of_the_folder_is_refused(
    step: Path, tmp_path: Path, world: World, name: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.move(step / name, elsewhere)
    (step / name).symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        resume(step, world)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"body": ' * 50_000,
        '{"body": null, "checksum": null}',
        '{"body": {"version": "1"}, "checksum": 0}',
        '{"body": {"version": 1e999}, "checksum": ""}',
    ],
    ids=["deep list", "deep mapping", "null", "text for a version", "infinite version"],
)
def test_json_that_is_made_to_break_a_reader_is_damage(step: Path, world: World, text: str) -> None:
    (step / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="is damaged"):
        resume(step, world)
