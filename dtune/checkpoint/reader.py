"""Finding a checkpoint that is whole, and reading ranges of its tensors."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from dtune.checkpoint.layout import (
    INDEX,
    PARAM,
    STATE,
    StoredTensor,
    list_steps,
    parse_index,
    parse_step,
    range_key,
    rng_file,
    step_name,
)
from dtune.checkpoint.manifest import (
    MALFORMED,
    Identity,
    Manifest,
    check_identity,
    check_parameters,
    check_state,
    find_unlisted,
    newer_format,
    read_manifest,
    verify,
)
from dtune.checkpoint.rng import restore_rng
from dtune.checkpoint.visible import read_patiently
from dtune.errors import CheckpointError, ConfigError
from dtune.runtime.tensors import DTYPE_NAMES, FileSource
from dtune.runtime.world import World
from dtune.types import Stateful

log = logging.getLogger("dtune")

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in a run folder."""

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint that was found whole."""

    path: Path
    manifest: Manifest
    scalars: Mapping[str, float | int]
    extra: Mapping[str, Any]
    """What the trainer gave to ``Checkpointer.save``."""
    tensors: Mapping[str, StoredTensor]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step


class CheckpointSource:
    """A TensorSource over the ranges of a checkpoint, whichever split wrote them."""

    def __init__(self, info: CheckpointInfo) -> None:
        self._info = info
        self._files = FileSource(
            {
                f"{part.file}/{range_key(name, part.start)}": (
                    info.path / part.file,
                    range_key(name, part.start),
                )
                for name, tensor in info.tensors.items()
                for part in tensor.ranges
            }
        )

    def __contains__(self, name: str) -> bool:
        return name in self._info.tensors

    def names(self) -> tuple[str, ...]:
        """Every name that can be read."""
        return tuple(self._info.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._info.tensors[name].shape

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, put together from what overlaps."""
        tensor = self._info.tensors[name]
        values = torch.empty(stop - start, dtype=_DTYPES[tensor.dtype])
        at = start
        for part in tensor.ranges:
            end = min(stop, part.stop)
            if part.start <= at < end:
                key = f"{part.file}/{range_key(name, part.start)}"
                values[at - start : end - start] = self._files.read(
                    key, at - part.start, end - part.start
                )
                at = end
        assert at >= stop, (name, start, stop, at)
        return values


def find_checkpoint(run_dir: Path, resume: str, world: World) -> CheckpointInfo | None:
    """The checkpoint to go on from, the same on every rank; None to start anew.

    ``resume`` is ``false``; ``auto``: the newest whole one of the run folder, if there is any; or
    the path of one step, or of another run folder: its newest whole one. A path outside of the
    run folder is where the run begins: once the run folder has a checkpoint, it goes on from that,
    so that a job which is started again with the same settings loses nothing. Damaged ones are
    named in a warning and kept. Raises ConfigError if the path holds no checkpoint,
    CheckpointError if none of those that are there is whole.
    """
    if resume == "false":
        return None
    own = run_dir / CHECKPOINTS
    if resume == "auto":
        return _newest(own, world)
    path = Path(resume)
    if not is_in(path, own) and (mine := _newest(own, world)):
        if world.is_first:
            log.info("resume=%s: %s has checkpoints since, and goes on from them", resume, run_dir)
        return mine
    if parse_step(path.name) is not None and path.is_dir():
        found, damage = open_whole(path, world)
        if found is None:
            raise CheckpointError(f"{path} cannot be resumed: {'; '.join(damage)}")
        return found
    for folder in (path / CHECKPOINTS, path):
        if found := _newest(folder, world):
            return found
    raise ConfigError(
        f"resume={resume} holds no checkpoint; give the folder of a run or of one step, or "
        "resume=auto"
    )


def is_in(path: Path, folder: Path) -> bool:
    """Whether a folder of a step lies in a folder of checkpoints, however they are written."""
    return path.resolve().parent == folder.resolve()


def open_checkpoint(path: Path) -> CheckpointInfo:
    """Read what a verified checkpoint says of itself. CheckpointError if it contradicts itself."""
    manifest = read_manifest(path)
    try:
        state = json.loads((path / STATE).read_bytes())
        tensors = parse_index((path / INDEX).read_bytes())
        info = CheckpointInfo(path, manifest, state["scalars"], state["extra"], tensors)
    except (OSError, *MALFORMED) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    files = {part.file for tensor in tensors.values() for part in tensor.ranges}
    if unknown := sorted(files - manifest.files.keys()):
        raise CheckpointError(f"{path / INDEX} needs {', '.join(unknown)}, which is not there")
    if gaps := find_gaps(tensors):
        raise CheckpointError(f"{path}: {'; '.join(gaps[:3])}")
    if unlisted := find_unlisted(path, manifest):
        log.warning("%s: not part of the checkpoint and not read: %s", path, ", ".join(unlisted))
    return info


def find_gaps(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Elements that no range holds, a line for each tensor that has any."""
    gaps = []
    for name, tensor in tensors.items():
        at = 0
        for part in tensor.ranges:
            if part.start > at:
                break
            at = max(at, part.stop)
        if at != (total := math.prod(tensor.shape)):
            gaps.append(f"{name} has {total} elements, and none are stored from {at} on")
    return gaps


def load_checkpoint(
    info: CheckpointInfo, *, engine: Stateful, identity: Identity, world: World
) -> None:
    """Put a prepared engine, and the generators of this process, where the checkpoint was.

    Raises ConfigError, on every rank and before anything is changed, if the run trains another
    model, other data, or with settings that may not change. Generators are restored if there are
    as many ranks as there were.
    """
    check_identity(info.path, info.manifest.identity, identity)
    own = {shard.name: tuple(shard.shape) for shard in engine.state().shards}
    wanted = {name: shape for part in world.gather(own) for name, shape in part.items()}
    trained = {n.removeprefix(PARAM): shape for n, shape in wanted.items() if n.startswith(PARAM)}
    check_parameters(info.path, info.manifest.parameters, trained)
    check_state(info.path, {name: t.shape for name, t in info.tensors.items()}, wanted)
    engine.load_state(CheckpointSource(info), info.scalars)
    saved_size = info.manifest.world_size
    if saved_size == world.size:
        _restore_generators(info.path / rng_file(world.rank), world)
    elif world.is_first:
        log.warning(
            "%s was written by %d ranks and is read by %d: random streams (dropout) start anew",
            info.path,
            saved_size,
            world.size,
        )


def _restore_generators(path: Path, world: World) -> None:
    try:
        restore_rng(load_file(path), world.device)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} holds no states of generators: {error!r}") from error


def open_whole(path: Path, world: World) -> tuple[CheckpointInfo | None, list[str]]:
    """The checkpoint if every rank finds it whole, else what any rank finds wrong."""
    found: CheckpointInfo | None = None
    damage = verify(path, world)
    if not damage:
        try:
            found = open_checkpoint(path)
        except CheckpointError as error:
            damage = [str(error)]
        damage = list(dict.fromkeys(line for lines in world.gather(damage) for line in lines))
    return (None, damage) if damage else (found, damage)


def _newest(folder: Path, world: World) -> CheckpointInfo | None:
    """The newest whole checkpoint of a folder; None where there is none at all."""
    refused = []
    none: list[int] = []
    steps, said = world.broadcast(
        read_patiently(lambda: list_steps(folder), none) if world.is_first else (none, "")
    )
    if said:
        raise CheckpointError(said)
    for step in reversed(steps):
        path = folder / step_name(step)
        if said := newer_format(path, world):
            # Not passed over: what is in it would be lost.
            raise CheckpointError(said)
        found, damage = open_whole(path, world)
        if found is not None:
            return found
        refused.extend(damage)
        if world.is_first:
            log.warning("%s is damaged and is passed over: %s", path, "; ".join(damage))
    if refused:
        raise CheckpointError(
            f"no checkpoint in {folder} is whole: {'; '.join(refused)}. "
            "Move them away to start anew"
        )
    return None
