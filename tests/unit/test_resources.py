"""Files that come with dtune, and optional packages that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtune import resources
from dtune.errors import ConfigError
from dtune.resources import find_data, resolve_path
from dtune.runtime import capabilities


def test_the_copy_inside_the_package_comes_before_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "dtune"
    for folder in (package / "conf", package.parent / "conf"):
        folder.mkdir(parents=True)
        (folder / "train.yaml").touch()
    monkeypatch.setattr(resources, "PACKAGE", package)
    assert find_data("conf", "train.yaml") == package / "conf"
    (package / "conf" / "train.yaml").unlink()
    assert find_data("conf", "train.yaml") == package.parent / "conf"
    (package.parent / "conf" / "train.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="install dtune again"):
        find_data("conf", "train.yaml")


@pytest.mark.parametrize(
    "name", ["tiny", "tiny/", "tiny/config.json", "instructions/train.jsonl", "instructions"]
)
def test_embedded_names_resolve_to_what_exists(name: str) -> None:
    assert Path(resolve_path(f"dtune://{name}")).exists()


@pytest.mark.parametrize("path", ["/data/x.jsonl", "org/model", "x", "hf://org/data"])
def test_other_paths_are_unchanged(path: str) -> None:
    assert resolve_path(path) == path


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("tinny", "dtune://tiny"), ("instructions/trian.jsonl", "dtune://instructions/train.jsonl")],
)
def test_an_unknown_embedded_name_is_answered_with_near_ones(wrong: str, near: str) -> None:
    with pytest.raises(ConfigError, match=near):
        resolve_path(f"dtune://{wrong}")


def test_embedded_names_stay_inside_the_assets() -> None:
    with pytest.raises(ConfigError):
        resolve_path("dtune://../errors.py")


def test_a_missing_package_is_named_with_the_setting_and_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(capabilities, "is_installed", lambda module: False)
    with pytest.raises(ConfigError, match=r"parallel=zero3 needs deepspeed.*dtune\[deepspeed\]"):
        capabilities.require("deepspeed", "parallel=zero3")


def test_a_folder_is_not_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb writes a folder ``wandb`` where it runs."""
    (tmp_path / "flash_attn").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    capabilities.is_installed.cache_clear()
    assert capabilities.is_installed("flash_attn") == bool(capabilities.version("flash-attn"))
