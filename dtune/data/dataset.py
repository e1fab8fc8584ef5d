"""Tokenised rows on disk: flat arrays, memory-mapped, no pickle."""

from __future__ import annotations

import hashlib
import json
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dtune.data.report import DataReport, Dropped
from dtune.types import IGNORE_INDEX, Example

_META = "meta.json"
LEFT_OUT = "left_out.jsonl"
"""Every row that is not in the data set: where it came from, and why not."""
_FLUSH_TOKENS = 1 << 20

# File -> dtype. tokens and trained run over all rows, one after another; so does origins, the
# UTF-8 of all origins. The offsets have one more entry than there are rows.
_ARRAYS: dict[str, type[np.generic]] = {
    "tokens": np.int32,
    "trained": np.uint8,
    "offsets": np.int64,
    "rows": np.int64,
    "origins": np.uint8,
    "origin_offsets": np.int64,
}


@dataclass(frozen=True)
class TokenDataset:
    """Rendered rows by number, 0 to ``len - 1``; what was left out has no number."""

    fingerprint: str
    """Hash of all tokens and of which are trained: equal data have equal fingerprints."""
    report: DataReport
    lengths: npt.NDArray[np.int64]
    """Tokens of each row."""
    arrays: dict[str, npt.NDArray[Any]]
    left_out: Path
    """File with a line of JSON for each row that was left out."""

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, number: int) -> npt.NDArray[np.int32]:
        """Token ids of a row."""
        start, stop = self.arrays["offsets"][number : number + 2]
        return self.arrays["tokens"][start:stop]

    def trained(self, number: int) -> npt.NDArray[np.uint8]:
        """1 for each token of a row that is predicted in training, never for the first."""
        start, stop = self.arrays["offsets"][number : number + 2]
        return self.arrays["trained"][start:stop]

    def origin(self, number: int) -> str:
        """Where a row came from: ``file.jsonl:17``."""
        start, stop = self.arrays["origin_offsets"][number : number + 2]
        return bytes(self.arrays["origins"][start:stop]).decode()

    def example(self, number: int) -> Example:
        """Return a row as it was rendered."""
        tokens = self.tokens(number)
        labels = np.where(self.trained(number) == 1, tokens, IGNORE_INDEX)
        row = int(self.arrays["rows"][number])
        return Example(row=row, input_ids=tokens.tolist(), labels=labels.tolist())


class DatasetWriter:
    """Writes examples to a folder as they come; holds little in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in _ARRAYS}
        self._files[LEFT_OUT] = (folder / LEFT_OUT).open("wb")
        self._tokens: array[int] = array("i")
        self._trained = bytearray()
        self._hash = hashlib.sha256()
        self._rows: array[int] = array("q")
        self._origin_offsets: array[int] = array("q", [0])
        self.lengths: array[int] = array("q")
        self.trained_tokens = 0

    def add(self, example: Example, origin: str) -> None:
        """Append one row. The label of a token is the token itself, or IGNORE_INDEX."""
        trained = bytearray(label != IGNORE_INDEX for label in example.labels)
        pairs = zip(example.input_ids, example.labels, strict=True)
        assert all(label in (token, IGNORE_INDEX) for token, label in pairs), origin
        # Nothing comes before the first token, from which it could be predicted.
        trained[0] = 0
        self._tokens.extend(example.input_ids)
        self._trained += trained
        self._rows.append(example.row)
        self.lengths.append(len(trained))
        self.trained_tokens += sum(trained)
        encoded = origin.encode()
        self._files["origins"].write(encoded)
        self._origin_offsets.append(self._origin_offsets[-1] + len(encoded))
        if len(self._tokens) >= _FLUSH_TOKENS:
            self._flush()

    def leave_out(self, origin: str, why: str) -> None:
        """List one row that is not added."""
        line = json.dumps({"row": origin, "why": why}, ensure_ascii=False) + "\n"
        self._files[LEFT_OUT].write(line.encode(errors="backslashreplace"))

    def _flush(self) -> None:
        assert self._tokens.itemsize == np.int32().itemsize
        for name, buffer in (("tokens", self._tokens), ("trained", self._trained)):
            self._files[name].write(buffer)
            self._hash.update(buffer)
        del self._tokens[:]
        self._trained.clear()

    def close(self) -> None:
        """Close the files; a folder that is not finished is worth nothing."""
        for file in self._files.values():
            file.close()

    def finish(self, report: DataReport) -> None:
        """Write what is left and the description that makes the folder a data set."""
        self._flush()
        offsets = np.concatenate([[0], np.cumsum(np.asarray(self.lengths, np.int64))])
        for update in (self._files["offsets"].write, self._hash.update):
            update(offsets.astype(np.int64).data)
        self._files["rows"].write(self._rows)
        self._files["origin_offsets"].write(self._origin_offsets)
        self.close()
        sizes = {name: (self._folder / f"{name}.bin").stat().st_size for name in _ARRAYS}
        meta = {
            "fingerprint": self._hash.hexdigest(),
            "bytes": sizes,
            "report": asdict(report),
        }
        (self._folder / _META).write_text(json.dumps(meta, indent=1), "utf-8")


def load_dataset_folder(folder: Path) -> TokenDataset | None:
    """Map a data set into memory; None where the folder is not there or not whole."""
    meta_file = folder / _META
    if not meta_file.is_file():
        return None
    meta = json.loads(meta_file.read_text("utf-8"))
    for name, size in meta["bytes"].items():
        file = folder / f"{name}.bin"
        if not file.is_file() or file.stat().st_size != size:
            return None
    arrays = {
        # asarray: a plain view of the mapped memory, which is faster to slice than a memmap.
        name: np.asarray(np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r"))
        for name, dtype in _ARRAYS.items()
    }
    fields = dict(meta["report"])
    for name in ("bad", "untrained", "long", "cut"):
        fields[name] = Dropped(**fields[name])
    return TokenDataset(
        fingerprint=meta["fingerprint"],
        report=DataReport(**fields),
        lengths=np.diff(arrays["offsets"]),
        arrays=arrays,
        left_out=folder / LEFT_OUT,
    )
