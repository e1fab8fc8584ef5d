"""Checkpoints of every released format are read for ever; what came later is told by name.

``tests/data/checkpoint-format-N`` was written by the first dtune of that format. Nobody may ever
write it anew.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dtune.checkpoint.layout import FORMAT_VERSION
from dtune.checkpoint.manifest import check_identity
from dtune.checkpoint.reader import find_checkpoint, load_checkpoint
from dtune.errors import ConfigError
from dtune.runtime.world import World
from tests.unit.checkpoint_runs import IDENTITY, HoldingEngine

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION + 1))
def test_a_checkpoint_of_each_format_is_whole_and_loads(
    tmp_path: Path, world: World, version: int
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(DATA / f"checkpoint-format-{version}", folder)
    info = find_checkpoint(tmp_path / "run", "auto", world)
    assert info is not None
    assert info.step == 7
    assert info.extra == {"position": 7, "best": 0.5, "history": [1.0, 1 / 3]}
    engine = HoldingEngine(world)
    load_checkpoint(info, engine=engine, identity=IDENTITY, world=world)
    assert engine.holds(7)


def test_a_setting_that_came_later_counts_as_its_default() -> None:
    settings = {**IDENTITY.settings, "peft.new": 3, "peft.more": ["a"]}
    added = replace(IDENTITY, settings=settings, defaults={"peft.new": 3, "peft.more": ["a"]})
    check_identity(Path("step"), IDENTITY, added)
    changed = replace(added, settings={**settings, "peft.new": 4})
    with pytest.raises(ConfigError, match=r"peft\.new was 3 and is 4"):
        check_identity(Path("step"), IDENTITY, changed)
    with pytest.raises(ConfigError, match=r"peft\.more was not set and is \['a'\]"):
        check_identity(Path("step"), IDENTITY, replace(added, defaults={"peft.new": 3}))


def test_a_setting_that_this_version_does_not_know_is_refused() -> None:
    saved = replace(IDENTITY, settings={**IDENTITY.settings, "peft.newer": True})
    with pytest.raises(ConfigError, match=r"peft\.newer was True and is not set"):
        check_identity(Path("step"), saved, IDENTITY)
