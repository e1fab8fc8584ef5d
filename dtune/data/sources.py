"""Where rows come from: a file, a folder, a Hub data set, or dtune's own corpus."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dtune.data.readers import READERS, RawRow
from dtune.errors import DataError
from dtune.resources import resolve_path

CORPUS = "dtune://corpus"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

log = logging.getLogger("dtune")


class Source(Protocol):
    """Rows in a fixed order, and a hash of their content."""

    def rows(self) -> Iterator[RawRow]:
        """All rows, from the first; can be called again."""
        ...

    def fingerprint(self) -> str:
        """Differs where the rows differ."""
        ...


@dataclass(frozen=True)
class FileSource:
    """Rows of files, one file after another."""

    files: tuple[Path, ...]

    def rows(self) -> Iterator[RawRow]:
        """Rows as the reader of each file's suffix yields them."""
        for path in self.files:
            yield from READERS[path.suffix.lower()](path)

    def fingerprint(self) -> str:
        """Hash of names, order and content; a name says how its file is read and reported."""
        total = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path}\0{content}\n".encode())
        return total.hexdigest()


class HubSource:
    """One split of a data set that the ``datasets`` library loads."""

    def __init__(self, path: str, *, split: str, key: str) -> None:
        """Load it, from the Hub or the library's cache.

        Raises:
            DataError: It cannot be loaded; carries the library's reason.
        """
        from datasets import load_dataset

        self._name = f"{path}[{split}]"
        try:
            self._dataset = load_dataset(path, split=split)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{key}={path}: there is no such file or folder, and loading it as a Hub data "
                f"set failed (split {split}): {error}"
            ) from error

    def rows(self) -> Iterator[RawRow]:
        """Rows in the order of the split, counted from 1."""
        for number, columns in enumerate(self._dataset, start=1):
            yield RawRow(f"{self._name}:{number}", columns)

    def fingerprint(self) -> str:
        """Hash of the library's cached files, whose names hold the revision."""
        total = hashlib.sha256(self._name.encode())
        for entry in self._dataset.cache_files:
            facts = os.stat(entry["filename"])
            total.update(f"{entry['filename']}\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
        return total.hexdigest()


class CorpusSource:
    """The corpus that the embedded model is pre-trained on, generated and never stored."""

    def rows(self) -> Iterator[RawRow]:
        """Documents in the column ``text``."""
        from dtune.assets.corpus import generate_corpus

        for number, text in enumerate(generate_corpus(), start=1):
            yield RawRow(f"{CORPUS}:{number}", {"text": text})

    def fingerprint(self) -> str:
        """Hash of the code that generates it."""
        from dtune.assets import ASSETS

        return hash_code(ASSETS)


def hash_code(folder: Path) -> str:
    """Hash the Python files of a folder."""
    total = hashlib.sha256()
    for file in sorted(folder.glob("*.py")):
        total.update(file.name.encode() + b"\0" + file.read_bytes())
    return total.hexdigest()


def open_source(path: str, *, split: str, key: str) -> Source:
    """Find what a path means; ``key`` is the config key that it stands in.

    Raises:
        DataError: Nothing is there, or nothing that can be read.
    """
    if path == CORPUS:
        return CorpusSource()
    files = find_local(path, key)
    return HubSource(path, split=split, key=key) if files is None else FileSource(files)


def find_local(path: str, key: str) -> tuple[Path, ...] | None:
    """Files that a path means; None for what is not on this machine, on the Hub or generated.

    Raises:
        DataError: Nothing is there, or nothing that can be read.
    """
    if path == CORPUS:
        return None
    place = Path(resolve_path(path)).expanduser()
    if place.is_dir():
        return _find_files(place, key)
    if place.exists():
        return (_check_file(place, key),)
    is_path = place.is_absolute() or path[:1] in ".~" or place.suffix.lower() in READERS
    if is_path or not _HUB_NAME.fullmatch(path):
        raise DataError(f"{key}={path}: there is no such file or folder{_near_names(place)}")
    return None


def _check_file(path: Path, key: str) -> Path:
    if path.suffix.lower() not in READERS:
        known = ", ".join(READERS)
        raise DataError(f"{key}={path}: expected a file that ends in one of {known}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"{key}={path} cannot be read: {error.strerror}") from error
    return path


def _find_files(folder: Path, key: str) -> tuple[Path, ...]:
    """Files of a folder and those below it that a reader knows, sorted; hidden ones are not."""
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    ]
    known = [path for path in files if path.suffix.lower() in READERS]
    if not known:
        raise DataError(f"{key}={folder}: the folder has no file that ends in {', '.join(READERS)}")
    if len(known) < len(files):
        others = sorted({path.name for path in files} - {path.name for path in known})
        log.info("%s: %d files are no data: %s", folder, len(others), ", ".join(others[:5]))
    return tuple(_check_file(path, key) for path in known)


def _near_names(path: Path) -> str:
    """Say what similar files lie where the path points."""
    import difflib

    if not path.parent.is_dir():
        return f", nor a folder {path.parent}"
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=3)
    return f"; did you mean {' or '.join(near)}?" if near else f" in {path.parent.absolute()}"
