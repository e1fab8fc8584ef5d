"""Looking through a checkpoint and exported weights: everything that can be wrong with them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from dtune.checkpoint.layout import PARAM, range_key, rng_file
from dtune.checkpoint.manifest import find_damage, find_unlisted, read_manifest
from dtune.checkpoint.reader import CheckpointInfo, open_checkpoint
from dtune.errors import CheckpointError
from dtune.runtime.tensors import FileSource

_PIECE = 1 << 24
_RNG = ("python", "python_gauss", "numpy", "numpy_gauss", "torch")
_MAY_HOLD_CODE = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class Inspected:
    """What is in a folder, and what is wrong with it."""

    files: int = 0
    size: int = 0
    """Bytes."""
    tensors: int = 0
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """Worth a word, and no damage."""


def inspect_checkpoint(path: Path) -> Inspected:
    """Every check of a published step: hashes, sizes, shapes, finite values, generators."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return Inspected(problems=(str(error),))
    files, size = len(manifest.files), sum(fact.size for fact in manifest.files.values())
    notes = tuple(f"{path / name} is no part of it" for name in find_unlisted(path, manifest))
    try:
        problems = find_damage(path, manifest)
    except CheckpointError as error:
        problems = [str(error)]
    if problems:
        return Inspected(files, size, 0, tuple(problems), notes)
    try:
        info = open_checkpoint(path)
    except CheckpointError as error:
        return Inspected(files, size, 0, (str(error),), notes)
    problems = [
        *_compare_headers(info),
        *_compare_shapes(info),
        *_check_generators(info),
    ]
    if not problems:
        problems = list(_find_infinite(info))
    return Inspected(files, size, len(info.tensors), tuple(problems), notes)


def inspect_export(folder: Path) -> Inspected:
    """Whether exported weights can be read, are all there, and are finite."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    problems: list[str] = []
    tensors = 0
    for file in files:
        if file.suffix == ".json":
            problems += _check_json(file)
        elif file.suffix == ".safetensors":
            count, wrong = _check_weights(file)
            tensors += count
            problems += wrong
    if not any(file.suffix == ".safetensors" for file in files):
        problems.append(f"{folder} holds no weights")
    notes = tuple(
        f"{file} may hold code and is never read" for file in files if file.suffix in _MAY_HOLD_CODE
    )
    size = sum(file.stat().st_size for file in files)
    return Inspected(len(files), size, tensors, tuple(problems), notes)


def _compare_headers(info: CheckpointInfo) -> Iterator[str]:
    """Ranges of the index that the files do not hold as it says."""
    expected: dict[str, dict[str, tuple[str, int]]] = {}
    for name, tensor in info.tensors.items():
        for part in tensor.ranges:
            key = range_key(name, part.start)
            expected.setdefault(part.file, {})[key] = (tensor.dtype, part.stop - part.start)
    for name, ranges in sorted(expected.items()):
        file = info.path / name
        try:
            held = _header(file)
        except (SafetensorError, OSError) as error:
            yield f"{file} is no file of tensors: {error}"
            continue
        for key, (dtype, count) in ranges.items():
            if held.get(key) != (dtype, (count,)):
                yield f"{file} holds {key} as {held.get(key)} and not as {(dtype, (count,))}"
        for key in held.keys() - ranges.keys():
            yield f"{file} holds {key}, which the index does not know"


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    with safe_open(file, framework="pt") as held:
        slices = {key: held.get_slice(key) for key in held.keys()}  # noqa: SIM118
        return {
            key: (part.get_dtype(), tuple(int(size) for size in part.get_shape()))
            for key, part in slices.items()
        }


def _compare_shapes(info: CheckpointInfo) -> Iterator[str]:
    stored = {
        name.removeprefix(PARAM): tensor.shape
        for name, tensor in info.tensors.items()
        if name.startswith(PARAM)
    }
    for name in sorted(stored.keys() | info.manifest.parameters.keys()):
        if stored.get(name) != info.manifest.parameters.get(name):
            yield (
                f"{info.path}: {name} is {stored.get(name)} in the index and "
                f"{info.manifest.parameters.get(name)} in the manifest"
            )


def _check_generators(info: CheckpointInfo) -> Iterator[str]:
    for rank in range(info.manifest.world_size):
        file = info.path / rng_file(rank)
        try:
            states = load_file(file)
            if absent := [name for name in _RNG if name not in states]:
                yield f"{file} lacks {', '.join(absent)}"
                continue
            torch.Generator().set_state(states["torch"])
        except (SafetensorError, OSError, RuntimeError, TypeError) as error:
            yield f"{file} holds no states of generators: {error}"


def _find_infinite(info: CheckpointInfo) -> Iterator[str]:
    """Tensors with values that are not finite, by name."""
    for name, tensor in info.tensors.items():
        counts = [0, 0]
        for part in tensor.ranges:
            file, key = info.path / part.file, range_key(name, part.start)
            for at, found in enumerate(_count_infinite(FileSource({key: (file, key)}), key)):
                counts[at] += found
        if any(counts):
            yield f"{info.path}: {name} {_told(counts)}"


def _count_infinite(source: FileSource, name: str) -> tuple[int, int]:
    """How many values are NaN, and how many infinite."""
    nan = infinite = 0
    total = math.prod(source.shape(name))
    for start in range(0, total, _PIECE):
        piece = source.read(name, start, min(start + _PIECE, total))
        if piece.is_floating_point() and not bool(torch.isfinite(piece).all()):
            nan += int(torch.isnan(piece).sum())
            infinite += int(torch.isinf(piece).sum())
    return nan, infinite


def _told(counts: list[int]) -> str:
    said = [f"{count} {what}" for count, what in zip(counts, ("NaN", "inf"), strict=True) if count]
    return f"has values that are not finite: {', '.join(said)}"


def _check_weights(file: Path) -> tuple[int, list[str]]:
    """Number of tensors, and what is wrong with them."""
    try:
        source = FileSource.of_files(file)
        names = source.names()
        counts = {name: list(_count_infinite(source, name)) for name in names}
    except (SafetensorError, CheckpointError, OSError, RuntimeError) as error:
        return 0, [f"{file} is not readable: {error}"]
    return len(names), [
        f"{file}: {name} {_told(found)}" for name, found in counts.items() if any(found)
    ]


def _check_json(file: Path) -> list[str]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        return [f"{file} is no JSON: {error}"]
    shards = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(shards, Mapping):
        return []
    names = sorted({str(name) for name in shards.values()})
    outside = [f"{file} names {name}, outside of its folder" for name in names if "/" in name]
    absent = [
        f"{file.with_name(name)} is missing"
        for name in names
        if "/" not in name and not file.with_name(name).is_file()
    ]
    return outside + absent
