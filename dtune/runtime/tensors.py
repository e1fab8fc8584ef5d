"""Safetensors files written one tensor at a time, and read as flat ranges.

The library writes a file from tensors that are all in memory, through a copy of each. What is
saved here may be larger than that leaves room for, and comes one tensor at a time.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open

from dtune.errors import CheckpointError
from dtune.runtime.watch.heartbeat import beat

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in the safetensors format."""

# Bytes handed to the file at once: large enough for the disk, small enough for a hash in cache.
CHUNK_BYTES = 1 << 24


class Digest(Protocol):
    """A hash that is fed in pieces."""

    def update(self, data: memoryview, /) -> None:
        """Take in the next bytes."""
        ...


@dataclass(frozen=True)
class TensorEntry:
    """What the header of a file says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorWriter:
    """Writes one safetensors file; a context manager that flushes to disk at its end.

    Each tensor of ``entries`` is written once and cast to its dtype; in the order of ``entries``
    where a ``digest`` is fed every byte of the file, else in any order. OSError passes through:
    no space, no right.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, TensorEntry],
        *,
        metadata: Mapping[str, str] | None = None,
        digest: Digest | None = None,
    ) -> None:
        self.path = path
        self._entries = dict(entries)
        self._header, self._offsets = _plan_header(self._entries, dict(metadata or {}))
        self._left = set(self._entries)
        self._digest = digest
        self._position = 0

    def __enter__(self) -> Self:
        self._file = open(self.path, "wb", buffering=0)
        self._put(memoryview(self._header))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if kind is None:
                assert not self._left, f"{self.path}: never written: {self._left}"
                os.fsync(self._file.fileno())

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor in its place."""
        beat()
        self._left.remove(name)
        entry, offset = self._entries[name], self._offsets[name]
        if offset != self._position:
            assert self._digest is None, f"{self.path}: {name} came out of order"
            self._position = self._file.seek(offset)
        assert tuple(tensor.shape) == entry.shape, (name, tensor.shape, entry.shape)
        flat = tensor.detach().to("cpu", entry.dtype).contiguous().reshape(-1)
        if flat.numel():
            self._put(flat.view(torch.uint8).numpy().data)

    def _put(self, data: memoryview) -> None:
        while data:
            piece = data[:CHUNK_BYTES]
            written = self._file.write(piece)
            assert written, f"{self.path}: the file took nothing"
            if self._digest is not None:
                self._digest.update(piece[:written])
            data = data[written:]
            self._position += written


def _plan_header(
    entries: Mapping[str, TensorEntry], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header, padded so that values begin at a multiple of 8 bytes, and where each begins."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for name, entry in entries.items():
        starts[name], end = end, end + entry.num_bytes
        header[name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    return prefix, {name: len(prefix) + start for name, start in starts.items()}


class FileSource:
    """A TensorSource over safetensors files, memory-mapped.

    ``names`` maps the name that is asked for to the file and the key it is stored under.
    """

    def __init__(self, names: Mapping[str, tuple[Path, str]]) -> None:
        self._names = dict(names)
        self._files: dict[Path, Any] = {}

    @classmethod
    def of_files(cls, *paths: Path) -> FileSource:
        """Every tensor of the files under its own name."""
        names: dict[str, tuple[Path, str]] = {}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                names.update({key: (path, key) for key in file.keys()})  # noqa: SIM118
        return cls(names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def names(self) -> tuple[str, ...]:
        """Every name that can be read."""
        return tuple(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the row-major flattened tensor, from the rows they lie in."""
        beat()
        part = self._slice(name)
        shape = tuple(part.get_shape())
        if not shape or 0 in shape:
            return self._whole(name).reshape(-1)[start:stop]
        row = math.prod(shape[1:])
        first = start // row
        rows: torch.Tensor = part[first : -(-stop // row)]
        return rows.reshape(-1)[start - first * row : stop - first * row]

    def _whole(self, name: str) -> torch.Tensor:
        path, key = self._names[name]
        tensor: torch.Tensor = self._open(path).get_tensor(key)
        return tensor

    def _slice(self, name: str) -> Any:
        path, key = self._names[name]
        return self._open(path).get_slice(key)

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"{path} is no file of tensors: {error}") from error
        return self._files[path]
