"""docs/config.md says what the schemas say."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest

from dtune.config.reference import (
    Key,
    describe_keys,
    describe_options,
    render,
    with_support_table,
)
from dtune.config.run import POLYMORPHIC, RunConfig
from dtune.config.suggest import all_keys

README = Path(__file__).parents[2] / "README.md"
CONFIG_MD = Path(__file__).parents[2] / "docs" / "config.md"


class Colour(Enum):
    red = "red"
    blue = "blue"


@dataclass
class Base:
    name: str = "base"
    # Told by the base.
    told: int = 1


@dataclass
class Sample(Base):
    """A sample."""

    # Of two
    # lines.
    colour: Colour = Colour.blue
    untold: list[str] = field(default_factory=lambda: ["a"])
    # Needed.
    path: str = "???"


def test_keys_take_their_meaning_from_the_comment_above() -> None:
    assert describe_keys(Sample, "x.") == [
        Key("x.told", "integer", "`1`", "Told by the base."),
        Key("x.colour", "`red`, `blue`", "`blue`", "Of two lines."),
        Key("x.untold", "list of text", "`[a]`", ""),
        Key("x.path", "text", "required", "Needed."),
    ]


def test_every_key_has_a_comment() -> None:
    configs: list[type] = [RunConfig]
    configs += [
        type(value) for value in vars(RunConfig()).values() if dataclasses.is_dataclass(value)
    ]
    configs += [reg.config(name) for reg in POLYMORPHIC.values() for name in reg.names()]
    untold = [
        f"{config.__name__}.{key.name}"
        for config in configs
        for key in describe_keys(config)
        if not key.meaning
    ]
    assert not untold


def test_every_key_and_option_is_in_the_reference() -> None:
    text = render()
    # The choice of an option is documented by the option, not as a key.
    keys = [key for key in all_keys() if not key.endswith(".name")]
    assert len(keys) > 50
    assert not [key for key in keys if f"| `{key}` |" not in text]
    groups = [path.name for path in (CONFIG_MD.parents[1] / "conf").iterdir() if path.is_dir()]
    options = [option.name for group in groups for option in describe_options(group)]
    assert len(options) > 30
    assert not [name for name in options if f"| `{name}`" not in text]


@pytest.mark.parametrize("group", sorted(POLYMORPHIC))
def test_every_registered_config_is_an_option(group: str) -> None:
    options = {option.name for option in describe_options(group)}
    # One that is a name for settings of several groups.
    assert options - {"qlora"} == set(POLYMORPHIC[group].names())


def test_docs_are_current() -> None:
    assert CONFIG_MD.read_text(encoding="utf-8") == render(), "run `make docs`"


def test_support_table_of_the_readme_is_current() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == with_support_table(text)
    assert re.search(r"\| `peft=[^`]*\blora\b[^`]*` \| yes \|", text)
