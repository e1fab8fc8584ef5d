"""Writing one step on all ranks, and publishing it or nothing."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import torch

from dtune import __version__
from dtune.checkpoint.layout import (
    INDEX,
    MANIFEST,
    PARAM,
    STATE,
    Digest,
    FileFact,
    Range,
    StoredTensor,
    describe_error,
    dump_index,
    hash_bytes,
    hash_file,
    naming,
    range_key,
    rank_file,
    rng_file,
    step_name,
)
from dtune.checkpoint.manifest import Manifest, dump_manifest, find_damage, read_manifest
from dtune.checkpoint.reader import find_gaps
from dtune.checkpoint.retention import prune, publish_names
from dtune.checkpoint.snapshot import Snapshot
from dtune.checkpoint.visible import await_visible
from dtune.errors import CheckpointError
from dtune.runtime.files import TEMPORARY, drop_from_memory, sync_folder, write_durably
from dtune.runtime.lock import check_held
from dtune.runtime.tensors import DTYPE_NAMES, TensorEntry, TensorWriter
from dtune.runtime.world import World

log = logging.getLogger("dtune")
T = TypeVar("T")


@dataclass(frozen=True)
class RankPart:
    """What one rank has written, and what tensors it knows."""

    files: Mapping[str, FileFact]
    ranges: list[tuple[str, Range]]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]


def write_step(
    snapshot: Snapshot,
    *,
    folder: Path,
    world: World,
    attempt: str,
    keep: int,
    read_back: bool,
) -> None:
    """Write, publish and prune, or raise CheckpointError on every rank with nothing published.

    With ``read_back`` each rank reads what it has written from the disk before that. A step that
    is there and whole is left as it is; a damaged one is kept under another name.
    ``world`` must talk over a group that no other thread uses.
    """
    name = step_name(snapshot.step)
    temporary = folder / f"{TEMPORARY}{name}-{attempt}"
    try:
        there, *_ = together(world, lambda: _prepare(folder / name, temporary, attempt, world))
        if not there:
            parts = together(world, lambda: _write_part(snapshot, temporary, world.rank))
            if read_back:
                together(world, lambda: _read_back(temporary, parts[world.rank]))
            together(world, lambda: _publish(snapshot, parts, temporary, folder / name, world))
    except CheckpointError as error:
        if world.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint of step {snapshot.step} was not saved in {folder}: {error}. "
            "Earlier checkpoints are as they were"
        ) from error
    together(world, lambda: _announce(snapshot, folder, keep, world))


def together(world: World, act: Callable[[], T]) -> list[T]:
    """What ``act`` gave on each rank; CheckpointError on all ranks if one had it, or an OSError."""
    value: T | None = None
    failure = ""
    try:
        value = act()
    except CheckpointError as error:
        failure = str(error)
    except OSError as error:
        failure = describe_error(error)
    outcomes = world.gather((value, failure))
    failures = [
        f"rank {rank}: {text}" if world.size > 1 else text
        for rank, (_, text) in enumerate(outcomes)
        if text
    ]
    if failures:
        raise CheckpointError("; ".join(failures))
    return [given for given, _ in outcomes]  # type: ignore[misc]


def _prepare(target: Path, temporary: Path, attempt: str, world: World) -> bool:
    """Whether a whole checkpoint of the step is already there; if not, make the folder for it."""
    with naming(temporary):
        if world.is_first and target.exists():
            if not _damage(target):
                log.info("%s is there already and whole; not written again", target)
                return True
            aside = target.with_name(f"{target.name}.damaged-{attempt}")
            log.warning("%s is damaged; kept as %s", target, aside.name)
            os.rename(target, aside)
        if world.is_first:
            (temporary / "rng").mkdir(parents=True, exist_ok=True)
    return False


def _damage(target: Path) -> list[str]:
    try:
        return find_damage(target, read_manifest(target))
    except CheckpointError as error:
        return [str(error)]


def _write_part(snapshot: Snapshot, temporary: Path, rank: int) -> RankPart:
    """Write the ranges and generators of this rank."""
    ranges = {range_key(part.name, part.start): part.values for part in snapshot.ranges}
    with naming(temporary):
        # Made by the first rank, but another host may not see it yet.
        (temporary / "rng").mkdir(parents=True, exist_ok=True)
    files = {
        name: _write_tensors(temporary / name, tensors)
        for name, tensors in ((rank_file(rank), ranges), (rng_file(rank), snapshot.rng))
    }
    stored = [
        (part.name, Range(rank_file(rank), part.start, part.start + part.values.numel()))
        for part in snapshot.ranges
    ]
    dtypes = {name: DTYPE_NAMES[dtype] for name, dtype in snapshot.dtypes.items()}
    return RankPart(files, stored, snapshot.shapes, dtypes)


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileFact:
    digest = Digest()
    entries = {name: TensorEntry(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with naming(path):
        with TensorWriter(path, entries, digest=digest) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        return FileFact(path.stat().st_size, str(digest.hexdigest()))


def _read_back(temporary: Path, part: RankPart) -> None:
    """CheckpointError where the disk does not hold what this rank has written."""
    for name, fact in part.files.items():
        path = temporary / name
        with naming(path):
            drop_from_memory(path)
            held = hash_file(path)
        if held != fact.digest:
            raise CheckpointError(
                f"{path} does not hold what was written to it: is the disk sound?"
            )


def _publish(
    snapshot: Snapshot, parts: list[RankPart], temporary: Path, target: Path, world: World
) -> None:
    """On the first rank: index, state, manifest, everything flushed, and the rename."""
    if not world.is_first:
        return
    files = {name: fact for part in parts for name, fact in part.files.items()}
    tensors = _join(parts)
    if gaps := find_gaps(tensors):
        raise CheckpointError(f"the engine left something out: {'; '.join(gaps[:3])}")
    await_visible({temporary / name: fact.size for name, fact in files.items()})
    if taken := check_held(target.parent.parent):
        raise CheckpointError(f"the run folder is in use by {taken}, which took this for dead")
    for name, data in ((INDEX, dump_index(tensors)), (STATE, snapshot.state)):
        with naming(temporary / name):
            write_durably(temporary / name, data)
        files[name] = FileFact(len(data), hash_bytes(data))
    parameters = {
        name.removeprefix(PARAM): tensor.shape
        for name, tensor in tensors.items()
        if name.startswith(PARAM)
    }
    manifest = Manifest(
        snapshot.step, world.size, snapshot.identity, parameters, files, __version__
    )
    with naming(temporary / MANIFEST):
        write_durably(temporary / MANIFEST, dump_manifest(manifest))
        sync_folder(temporary / "rng")
        sync_folder(temporary)
    with naming(target):
        os.rename(temporary, target)
        sync_folder(target.parent)


def _join(parts: list[RankPart]) -> dict[str, StoredTensor]:
    """The tensors of all ranks with their ranges in order."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    ranges: dict[str, list[Range]] = {}
    for part in parts:
        for name, shape in part.shapes.items():
            if shapes.setdefault(name, shape) != shape:
                raise CheckpointError(f"ranks differ on the shape of {name}")
            dtypes[name] = part.dtypes[name]
        for name, stored in part.ranges:
            ranges.setdefault(name, []).append(stored)
    return {
        name: StoredTensor(shape, dtypes[name], _ordered(name, ranges.get(name, [])))
        for name, shape in shapes.items()
    }


def _ordered(name: str, ranges: list[Range]) -> tuple[Range, ...]:
    """By start. What two ranks save may differ, so one of them must leave it to the other."""
    ordered = sorted(ranges, key=lambda part: part.start)
    for before, after in pairwise(ordered):
        if after.start < before.stop:
            raise CheckpointError(
                f"{name} from {after.start} on is saved in {before.file} and in {after.file}"
            )
    return tuple(ordered)


def _announce(snapshot: Snapshot, folder: Path, keep: int, world: World) -> None:
    if world.is_first:
        with naming(folder):
            publish_names(folder, snapshot.step, best_step=snapshot.best_step)
        prune(folder, newest=snapshot.step, keep=keep, best_step=snapshot.best_step)
