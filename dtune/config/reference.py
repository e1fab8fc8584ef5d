"""Writes docs/config.md from the schemas: every group, its options, and every key.

The meaning of a key is the comment above its field: ``python -m dtune.config.reference FILE``.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from dtune.config.planning import PlanSettings
from dtune.config.run import POLYMORPHIC, RunConfig
from dtune.config.support import support_table
from dtune.resources import find_data

TABLE_START = "<!-- support table: make docs -->"
TABLE_END = "<!-- end of support table -->"

INTRO = """# Config reference

Generated from the schemas by `make docs`; do not edit.

Settings are written `group=option` and `key=value` behind a command, as in
`dtune train model=tiny peft=lora peft.rank=8`. `dtune config ...` prints what a command comes to,
`dtune plan ...` what it would do. An option is a file in `conf/<group>/`; a folder of your own with
the same layout is added with `hydra.searchpath=[file:///my/conf]`. With `-m`, values that are given
as `a,b,c` are swept over: each trial is a process tree and a run folder of its own, in
`hydra.sweep.dir`, and `hydra.launcher.parallel=2` runs two at once.
"""


@dataclass(frozen=True)
class Key:
    """One setting."""

    name: str
    kind: str
    default: str
    meaning: str
    """The comment above its field; empty where there is none, which a test refuses."""


@dataclass(frozen=True)
class Option:
    """One file of a group."""

    name: str
    meaning: str
    settings: str
    """What it sets beside its schema."""


def describe_keys(config: type, prefix: str = "") -> list[Key]:
    """The keys of a config dataclass, without its ``name`` and without nested configs."""
    hints = get_type_hints(config)
    comments = _field_comments(config)
    found = []
    for field in dataclasses.fields(config):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind) or (field.name == "name" and kind is str):
            continue
        default = _default_text(field)
        meaning = comments.get(field.name, "")
        found.append(Key(f"{prefix}{field.name}", _kind_text(kind), default, meaning))
    return found


def _field_comments(config: type) -> dict[str, str]:
    """Field -> the comment lines right above it, of the class and of those it derives from."""
    comments: dict[str, str] = {}
    for owner in reversed(config.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        lines = inspect.cleandoc(inspect.getsource(owner)).splitlines()
        (body,) = ast.parse("\n".join(lines)).body
        assert isinstance(body, ast.ClassDef)
        for node in body.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                comments[node.target.id] = _comment_above(lines, node.lineno - 1)
    return comments


def _comment_above(lines: Sequence[str], index: int) -> str:
    found: list[str] = []
    while index > 0 and lines[index - 1].strip().startswith("#"):
        index -= 1
        found.insert(0, lines[index].strip().removeprefix("#").strip())
    return " ".join(found)


def _kind_text(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{member.value}`" for member in kind)
    if isinstance(kind, UnionType):
        return " or ".join(_kind_text(member) for member in get_args(kind))
    if get_origin(kind) is list:
        return f"list of {_kind_text(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "mapping"
    names = {"str": "text", "bool": "true, false", "int": "integer", "float": "number"}
    return (names | {"NoneType": "null"})[kind.__name__]


def _default_text(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value == "???":
        return "required"
    if isinstance(value, Enum):
        value = value.value
    return f"`{_yaml_text(value)}`"


def _yaml_text(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def describe_options(group: str) -> list[Option]:
    """The files of a group in conf/, in order of name."""
    folder = find_data("conf", "train.yaml") / group
    return [_option(path, group) for path in sorted(folder.glob("*.yaml"))]


def _option(path: Path, group: str) -> Option:
    text = path.read_text(encoding="utf-8")
    comments = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            comments.append(line.removeprefix("#").strip())
    meaning = " ".join(" ".join(comments).split())
    if not meaning and group in POLYMORPHIC:
        meaning = _first_line(POLYMORPHIC[group].config(path.stem))
    content = yaml.safe_load(text) or {}
    content.pop("name", None)
    return Option(path.stem, meaning, ", ".join(_settings(content, "")))


def _settings(content: dict[str, Any], prefix: str) -> Iterator[str]:
    """``key=value`` of what an option sets, and ``group=option`` of what it chooses."""
    for key, value in content.items():
        if key == "defaults":
            yield from _choices(value)
        elif isinstance(value, dict):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"`{prefix}{key}={_yaml_text(value)}`"


def _choices(defaults: list[Any]) -> Iterator[str]:
    for entry in defaults:
        if isinstance(entry, dict):
            for group, option in entry.items():
                yield f"`{group.removeprefix('override ').lstrip('/')}={option}`"


def _first_line(config: type) -> str:
    return (config.__doc__ or "").strip().splitlines()[0]


def _default_options() -> dict[str, str]:
    text = (find_data("conf", "train.yaml") / "train.yaml").read_text(encoding="utf-8")
    entries = yaml.safe_load(text)["defaults"]
    return {
        group: option
        for entry in entries
        if isinstance(entry, dict)
        for group, option in entry.items()
        if not group.startswith("override ")
    }


def render() -> str:
    """The whole reference as Markdown."""
    parts = [INTRO, "## The run\n", _table_of_keys(describe_keys(RunConfig))]
    chosen = _default_options()
    hints = get_type_hints(RunConfig)
    for field in dataclasses.fields(RunConfig):
        if field.name in POLYMORPHIC:
            registry = POLYMORPHIC[field.name]
            keys = _keys_of_options(field.name)
            parts += [*_head(field.name, registry.base, chosen), keys]
        elif dataclasses.is_dataclass(hints[field.name]):
            config = hints[field.name]
            keys = _table_of_keys(describe_keys(config, f"{field.name}."))
            parts += [*_head(field.name, config, chosen), keys]
    parts += ["## experiment\n", "Settings that belong together.\n"]
    parts.append(_table_of_options(describe_options("experiment"), ""))
    parts += ["## dtune plan\n", "Settings of `dtune plan` alone, beside those of the run.\n"]
    parts.append(_table_of_keys(describe_keys(PlanSettings)))
    return "\n".join(parts)


def _head(group: str, config: type, chosen: dict[str, str]) -> list[str]:
    parts = [f"## {group}\n", f"{_first_line(config)}\n"]
    if options := describe_options(group):
        parts.append(_table_of_options(options, chosen.get(group, "")))
    return parts


def _keys_of_options(group: str) -> str:
    """One table for a group whose options have different keys."""
    registry = POLYMORPHIC[group]
    owners: dict[Key, list[str]] = {}
    for name in registry.names():
        for key in describe_keys(registry.config(name), f"{group}."):
            owners.setdefault(key, []).append(name)
    if not owners:
        return ""
    everyone = len(registry.names())
    rows = [
        (*_cells(key), "all" if len(names) == everyone else ", ".join(names))
        for key, names in owners.items()
    ]
    return _markdown(("key", "value", "default", "meaning", "options"), rows)


def _table_of_keys(keys: Iterable[Key]) -> str:
    return _markdown(("key", "value", "default", "meaning"), [_cells(key) for key in keys])


def _cells(key: Key) -> tuple[str, ...]:
    return (f"`{key.name}`", key.kind, key.default, key.meaning)


def _table_of_options(options: Iterable[Option], default: str) -> str:
    rows = [
        (
            f"`{option.name}`{' (default)' * (option.name == default)}",
            option.meaning,
            option.settings,
        )
        for option in options
    ]
    return _markdown(("option", "meaning", "sets"), rows)


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    lines += [
        " | ".join(cell.replace("|", "\\|").replace("``", "`") for cell in row) for row in rows
    ]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def with_support_table(text: str) -> str:
    """The text with what is between its two marks replaced by the support table."""
    before, _, rest = text.partition(TABLE_START)
    _, _, after = rest.partition(TABLE_END)
    return f"{before}{TABLE_START}\n{support_table()}\n{TABLE_END}{after}"


def main(reference: Path, readme: Path) -> None:
    """Write the generated documents anew."""
    reference.write_text(render(), encoding="utf-8")
    readme.write_text(with_support_table(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
