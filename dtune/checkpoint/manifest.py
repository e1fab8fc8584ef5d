"""What a checkpoint is of, and whether it is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dtune import __version__
from dtune.checkpoint.layout import (
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    STATE,
    FileFact,
    check_file_name,
    dump_json,
    hash_bytes,
    hash_file,
    is_link_within,
    naming,
    rank_file,
    rng_file,
    step_name,
)
from dtune.checkpoint.visible import await_visible, may_pass, read_patiently
from dtune.errors import CheckpointError, ConfigError
from dtune.runtime.world import World

# What parsing raises of text that is not what it should be, nested too deeply included.
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)

Setting = str | int | float | bool | list[str]


@dataclass(frozen=True)
class Identity:
    """What a run must have in common with a checkpoint that it goes on from."""

    model: str
    """Kind of the base and fingerprints of its files, wherever they lie."""
    data: str
    """Fingerprint of the data files and of how rows are rendered."""
    settings: Mapping[str, Setting] = field(default_factory=dict)
    """Config keys that must not change, with their values: ``optim.name``, ``seed``, ..."""
    engine: str = ""
    """For people; any engine reads what another wrote."""
    last_sequence: int = 0
    """Where ``train.epochs`` ends the data, which may change; 0: nowhere."""
    defaults: Mapping[str, Setting] = field(default_factory=dict)
    """Of those settings that have one. Not saved: they tell what a checkpoint was made with that
    is older than a setting."""


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``."""

    step: int
    world_size: int
    identity: Identity
    parameters: Mapping[str, tuple[int, ...]]
    """Trained parameters and their shapes."""
    files: Mapping[str, FileFact]
    written_by: str = ""
    """Version of dtune; empty where it did not say yet."""


class NewerFormatError(CheckpointError):
    """A checkpoint is whole, as far as can be told, and of a format that came later."""


def dump_manifest(manifest: Manifest) -> bytes:
    """Bytes of ``manifest.json``: they carry their own checksum."""
    body = {"version": FORMAT_VERSION, **asdict(manifest)}
    del body["identity"]["defaults"]
    return dump_json({"body": body, "checksum": hash_bytes(dump_json(body))})


def read_manifest(path: Path) -> Manifest:
    """Parse the manifest of a step folder. CheckpointError if it is missing, damaged or newer."""
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    if file.is_symlink():
        raise CheckpointError(f"{file} is a symbolic link, which no checkpoint has")
    with naming(file):
        raw = file.read_bytes()
    try:
        outer = json.loads(raw)
        body, checksum = outer["body"], outer["checksum"]
        # Byte for byte, so that there is no place in the file where a flipped bit goes unseen.
        whole = dump_json(outer) == raw and hash_bytes(dump_json(body)) == checksum
        if not whole:
            raise CheckpointError(f"{file} is damaged: its checksum does not fit")
        if body["version"] > FORMAT_VERSION:
            raise NewerFormatError(
                f"{path} has format version {body['version']}, written by dtune "
                f"{body.get('written_by') or 'of a later version'}; dtune {__version__} reads up "
                f"to version {FORMAT_VERSION}. Update dtune (pip install --upgrade dtune), or go "
                "on from a checkpoint of this version with resume=PATH"
            )
        manifest = _parse(body)
    except MALFORMED as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if step_name(manifest.step) != path.name:
        raise CheckpointError(f"{file} is of step {manifest.step}, not of this folder")
    return manifest


def _parse(body: dict[str, Any]) -> Manifest:
    files = {check_file_name(name): FileFact(**fact) for name, fact in body["files"].items()}
    manifest = Manifest(
        step=body["step"],
        world_size=body["world_size"],
        identity=Identity(**body["identity"]),
        parameters={name: tuple(shape) for name, shape in body["parameters"].items()},
        files=files,
        written_by=body.get("written_by", ""),
    )
    ranks = range(manifest.world_size)
    due = {INDEX, STATE, *map(rank_file, ranks), *map(rng_file, ranks)}
    if due - files.keys():
        raise CheckpointError(f"the manifest lacks {', '.join(sorted(due - files.keys()))}")
    return manifest


def find_damage(path: Path, manifest: Manifest, *, share: int = 0, of: int = 1) -> list[str]:
    """What is wrong with the files of one share: missing, of another size, of another hash."""
    damage = []
    for name in sorted(manifest.files)[share::of]:
        file = path / name
        with naming(file):
            if said := _fault(file, manifest.files[name], is_link=is_link_within(path, name)):
                damage.append(f"{file} {said}")
    return damage


def _fault(file: Path, fact: FileFact, *, is_link: bool) -> str:
    if is_link:
        return "is a symbolic link, which no checkpoint has"
    if not file.is_file():
        return "is missing"
    if (size := file.stat().st_size) != fact.size:
        return f"has {size} bytes instead of {fact.size}"
    return "" if hash_file(file) == fact.digest else "is damaged: its hash does not fit"


def verify(path: Path, world: World) -> list[str]:
    """What is wrong with a checkpoint, agreed by all ranks, each of which reads its share.

    CheckpointError on all of them where the disk cannot be read, which says nothing of the
    checkpoint. One that can never be read in a place (EIO) is damaged.
    """
    nothing: dict[str, int] = {}
    seen, said = world.broadcast(
        read_patiently(lambda: _sizes(path), nothing) if world.is_first else (nothing, "")
    )
    damage: list[str] = []
    if not said:
        damage, said = read_patiently(lambda: _find_in_share(path, seen, world), damage)
    told = world.gather(([*damage, said] if said else damage, said))
    away = [said for _, said in told if may_pass(said) and "(EIO)" not in said]
    if away:
        raise CheckpointError(
            f"{path} cannot be read now, and may be whole: {away[0]}. Start the run again once "
            "the disk is there"
        )
    return list(dict.fromkeys(line for lines, _ in told for line in lines))


def _find_in_share(path: Path, seen: Mapping[str, int], world: World) -> list[str]:
    await_visible({path / name: size for name, size in seen.items()})
    return find_damage(path, read_manifest(path), share=world.rank, of=world.size)


def _sizes(path: Path) -> dict[str, int]:
    """Size of every file of a folder, by its path in it."""
    files = [file for file in path.rglob("*") if file.is_file()]
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in files}


def newer_format(path: Path, world: World) -> str:
    """What any rank says of a checkpoint of a later format; empty for one that can be read."""
    said = ""
    try:
        read_manifest(path)
    except NewerFormatError as error:
        said = str(error)
    except (CheckpointError, OSError):
        pass  # Damaged, which is told by whoever verifies it.
    return next(filter(None, world.gather(said)), "")


def find_unlisted(path: Path, manifest: Manifest) -> list[str]:
    """Files in the folder that the checkpoint does not own and that are never read."""
    known = {MANIFEST, *manifest.files}
    found = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return sorted(name for name in found if name not in known)


def check_identity(path: Path, saved: Identity, current: Identity) -> None:
    """ConfigError that lists how the run differs from the one that wrote the checkpoint.

    A setting that came after the checkpoint counts as what it is by default.
    """
    added = {key: value for key, value in current.defaults.items() if key in current.settings}
    before: dict[str, Setting] = {"model": saved.model, "data": saved.data}
    before |= {**json.loads(dump_json(added)), **saved.settings}
    settings = json.loads(dump_json(current.settings))
    now = {"model": current.model, "data": current.data, **settings}
    keys = [*before, *(key for key in now if key not in before)]
    lines = [
        f"{key} was {_shown(before, key)} and is {_shown(now, key)}"
        for key in keys
        if _shown(before, key) != _shown(now, key)
    ]
    if lines:
        raise ConfigError(
            f"{path} is of another run: {'; '.join(lines)}. Set these back, or start anew with "
            "another run_dir"
        )


def check_parameters(
    path: Path, saved: Mapping[str, tuple[int, ...]], current: Mapping[str, tuple[int, ...]]
) -> None:
    """ConfigError that names the first parameters that the run trains and the checkpoint not."""
    lines = [
        f"{name} is {_shape(saved, name)} in the checkpoint and {_shape(current, name)} here"
        for name in sorted(saved.keys() | current.keys())
        if saved.get(name) != current.get(name)
    ]
    if lines:
        more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
        raise ConfigError(
            f"{path} is of another model or other peft settings: {'; '.join(lines[:3])}{more}"
        )


def check_state(
    path: Path, saved: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """ConfigError that names a tensor of the optimizer that the checkpoint cannot give."""
    for name, shape in sorted(wanted.items()):
        if saved.get(name) != shape:
            raise ConfigError(
                f"{path} is of another optimizer: {name} is {_shape(saved, name)} in the "
                f"checkpoint and {list(shape)} here; set optim as it was"
            )


def _shown(settings: Mapping[str, Setting], key: str) -> str:
    return repr(settings[key]) if key in settings else "not set"


def _shape(parameters: Mapping[str, tuple[int, ...]], name: str) -> str:
    return str(list(parameters[name])) if name in parameters else "absent"
