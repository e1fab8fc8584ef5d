"""The format on disk: names, JSON, hashes.

A checkpoint of step 123 is a folder ``step-00000123`` with

- ``rank-00000.safetensors``, ...: 1-D ranges of tensors, each under ``<tensor>@<start>``;
- ``index.json``: for each tensor its shape, dtype, and which file holds which range;
- ``state.json``: step, the engine's scalars, and what the trainer adds;
- ``rng/rank-00000.safetensors``, ...: states of the random number generators of each rank;
- ``manifest.json``: written last; size and hash of every other file, and what run it is of.

Nothing in it is code, and nothing that reads it runs any.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from dtune.errors import CheckpointError
from dtune.runtime.tensors import CHUNK_BYTES

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.json"
STATE = "state.json"
LATEST = "LATEST"
BEST = "BEST"
PARAM = "param/"
"""Prefix of the names of trained parameters among the tensors."""

_STEP = re.compile(r"step-(\d{8,})")
# No other name is ever opened, so that no path of a manifest or index leads out of its folder.
_FILE = re.compile(r"index\.json|state\.json|(rng/)?rank-\d{5,}\.safetensors")

Digest = xxhash.xxh3_128
"""Finds damage, not forgery: 22 GB/s a core where SHA-256 with its instructions has 1.4 GB/s."""


@dataclass(frozen=True)
class FileFact:
    """Size in bytes and hash of a file."""

    size: int
    digest: str


@dataclass(frozen=True)
class Range:
    """Elements [start, stop) of a flattened tensor, and the file that holds them."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor as the index describes it."""

    shape: tuple[int, ...]
    dtype: str
    ranges: tuple[Range, ...]
    """By start."""


def step_name(step: int) -> str:
    """Name of the folder of a step."""
    return f"step-{step:08d}"


def parse_step(name: str) -> int | None:
    """The step of a published folder's name; None for any other name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def list_steps(folder: Path) -> list[int]:
    """Published steps, oldest first, whole or damaged."""
    if not folder.is_dir():
        return []
    steps = (parse_step(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(step for step in steps if step is not None)


def rank_file(rank: int) -> str:
    """File of the ranges of a rank."""
    return f"rank-{rank:05d}.safetensors"


def rng_file(rank: int) -> str:
    """File of the generators of a rank."""
    return f"rng/rank-{rank:05d}.safetensors"


def range_key(name: str, start: int) -> str:
    """Key of a range in the file of a rank."""
    return f"{name}@{start}"


def check_file_name(name: str) -> str:
    """The name itself, if it is one that this format writes."""
    if not _FILE.fullmatch(name):
        raise CheckpointError(f"{name!r} is not the name of a file of a checkpoint")
    return name


def dump_json(value: Any) -> bytes:
    """The one way in which a value is written: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def hash_bytes(data: bytes) -> str:
    """Hexadecimal digest."""
    return str(Digest(data).hexdigest())


def hash_file(path: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = Digest()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return str(digest.hexdigest())


def dump_index(tensors: Mapping[str, StoredTensor]) -> bytes:
    """Bytes of ``index.json``."""
    return dump_json(
        {
            name: {
                "shape": tensor.shape,
                "dtype": tensor.dtype,
                "ranges": [[part.file, part.start, part.stop] for part in tensor.ranges],
            }
            for name, tensor in tensors.items()
        }
    )


def parse_index(data: bytes) -> dict[str, StoredTensor]:
    """The tensors of ``index.json``."""
    return {
        name: StoredTensor(
            shape=tuple(entry["shape"]),
            dtype=entry["dtype"],
            ranges=tuple(
                Range(check_file_name(file), start, stop) for file, start, stop in entry["ranges"]
            ),
        )
        for name, entry in json.loads(data).items()
    }


def is_link_within(folder: Path, name: str) -> bool:
    """Whether a file of a checkpoint, or the folder in it that it lies in, is a symbolic link."""
    file = folder / name
    return file.is_symlink() or (file.parent != folder and file.parent.is_symlink())


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a CheckpointError that names the file and the reason."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(describe_error(error, path)) from error


def describe_error(error: OSError, path: Path | None = None) -> str:
    """The file, the reason, and its name by which `may_pass` knows it."""
    code = errno.errorcode.get(error.errno or 0, "OSError")
    return f"{path or error.filename or 'a file'}: {error.strerror or error} ({code})"
