"""What a checkpoint is of, and whether it is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
    naming,
    rank_file,
    rng_file,
    step_name,
)
from dtune.errors import CheckpointError, ConfigError
from dtune.runtime.world import World

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


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``."""

    step: int
    world_size: int
    identity: Identity
    parameters: Mapping[str, tuple[int, ...]]
    """Trained parameters and their shapes."""
    files: Mapping[str, FileFact]


def dump_manifest(manifest: Manifest) -> bytes:
    """Bytes of ``manifest.json``: they carry their own checksum."""
    body = {"version": FORMAT_VERSION, **asdict(manifest)}
    return dump_json({"body": body, "checksum": hash_bytes(dump_json(body))})


def read_manifest(path: Path) -> Manifest:
    """Parse the manifest of a step folder. CheckpointError if it is missing, damaged or newer."""
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    with naming(file):
        raw = file.read_bytes()
    try:
        outer = json.loads(raw)
        body, checksum = outer["body"], outer["checksum"]
        # Byte for byte, so that there is no place in the file where a flipped bit goes unseen.
        whole = dump_json(outer) == raw and hash_bytes(dump_json(body)) == checksum
        if not whole:
            raise CheckpointError(f"{file} is damaged: its checksum does not fit")
        if body["version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{file} has format version {body['version']}, this dtune reads {FORMAT_VERSION}"
            )
        manifest = _parse(body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
        fact, file = manifest.files[name], path / name
        if not file.is_file():
            damage.append(f"{file} is missing")
        elif (size := file.stat().st_size) != fact.size:
            damage.append(f"{file} has {size} bytes instead of {fact.size}")
        elif hash_file(file) != fact.digest:
            damage.append(f"{file} is damaged: its hash does not fit")
    return damage


def verify(path: Path, world: World) -> list[str]:
    """What is wrong with a checkpoint, agreed by all ranks, each of which reads its share."""
    try:
        damage = find_damage(path, read_manifest(path), share=world.rank, of=world.size)
    except (CheckpointError, OSError) as error:
        damage = [str(error)]
    return list(dict.fromkeys(line for lines in world.gather(damage) for line in lines))


def find_unlisted(path: Path, manifest: Manifest) -> list[str]:
    """Files in the folder that the checkpoint does not own and that are never read."""
    known = {MANIFEST, *manifest.files}
    found = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return sorted(name for name in found if name not in known)


def check_identity(path: Path, saved: Identity, current: Identity) -> None:
    """ConfigError that lists how the run differs from the one that wrote the checkpoint."""
    before = {"model": saved.model, "data": saved.data, **saved.settings}
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
