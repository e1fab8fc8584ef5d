"""From rows to tokens, kept on disk by content."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NoReturn

from dtune.data.dataset import DatasetWriter, TokenDataset, load_dataset_folder
from dtune.data.formats import MissingColumn, guess_formats, parse_row
from dtune.data.readers import RawRow
from dtune.data.report import EXAMPLES, DataReport, Dropped
from dtune.data.schema import DataConfig, OnBadRow, OnLongRow
from dtune.data.sources import Source, hash_code, open_source
from dtune.errors import ConfigError, DataError
from dtune.runtime.watch.heartbeat import beat
from dtune.runtime.world import World
from dtune.types import Example, Objective, Row

log = logging.getLogger("dtune")


@dataclass(frozen=True)
class Part:
    """The training or the held-out part of the data: where it is and which key says so."""

    config: DataConfig
    key: str
    path: str
    split: str
    max_rows: int

    @classmethod
    def of(cls, config: DataConfig, which: str) -> Part:
        """``train`` or ``eval``; data.max_rows limits training only."""
        assert which in ("train", "eval"), which
        if which == "train":
            return cls(config, "data.path", config.path, config.split, config.max_rows)
        return cls(config, "data.eval_path", config.eval_path, config.eval_split, 0)

    def open(self) -> Source:
        """Find the rows.

        Raises:
            ConfigError: There are none.
        """
        return open_source(self.path, split=self.split, key=self.key)

    def parse(self, source: Source) -> Iterator[tuple[RawRow, Row | DataError]]:
        """Each row in canonical form, or what is wrong with it."""
        rows = islice(source.rows(), self.max_rows or None)
        for index, raw in enumerate(rows):
            try:
                yield raw, parse_row(index, raw, self.config.format, self.config.columns)
            except DataError as error:
                yield raw, error


class _Tokenizing:
    """One pass over a source: examples to the writer, everything else to the report."""

    def __init__(
        self, part: Part, source: Source, objective: Objective, writer: DatasetWriter
    ) -> None:
        self._part = part
        self._source = source
        self._objective = objective
        self._writer = writer
        self._longest = 0
        self._refused: list[str] = []
        self.report = DataReport()

    def run(self) -> None:
        """Raise DataError where the config says that a row stops the run, or none is left."""
        for raw, row in self._part.parse(self._source):
            beat()
            self.report.rows_read += 1
            if isinstance(row, DataError):
                self._drop_bad(row, raw)
            elif not self._refused:
                self._add(row, raw)
        if self._refused:
            self._refuse()
        self._check_long()
        self._check_rows()
        self.report.rows_kept = len(self._writer.lengths)
        self.report.tokens = sum(self._writer.lengths)
        self.report.trained_tokens = self._writer.trained_tokens
        self.report.count_lengths(self._writer.lengths)

    def _add(self, row: Row, raw: RawRow) -> None:
        try:
            example = self._objective.render(row)
        except DataError as error:
            self._drop_bad(error, raw)
            return
        if example.num_targets == 0:
            self._drop_untrained(row, "has no token to train on")
            return
        kept = self._fit(example, row.origin)
        if kept is None:
            return
        if kept.num_targets == 0:
            limit = self._part.config.max_length
            self._drop_untrained(
                row,
                f"no token to train on is left in the first data.max_length={limit} "
                f"of {len(example.input_ids)} tokens",
            )
            return
        cut = len(example.input_ids) - len(kept.input_ids)
        if cut:
            self.report.cut.add(f"{row.origin} ({len(example.input_ids)} tokens)", cut)
        self._writer.add(kept, row.origin)

    def _fit(self, example: Example, origin: str) -> Example | None:
        """Return the example at most max_length long, or None where that leaves it out."""
        length, limit = len(example.input_ids), self._part.config.max_length
        if length <= limit:
            return example
        if self._part.config.on_long_row is OnLongRow.truncate:
            return Example(example.row, example.input_ids[:limit], example.labels[:limit])
        self._longest = max(self._longest, length)
        self.report.long.add(f"{origin} ({length} tokens)", length)
        self._writer.leave_out(origin, f"{length} tokens, above data.max_length={limit}")
        return None

    def _drop_bad(self, error: DataError, raw: RawRow) -> None:
        if isinstance(error, MissingColumn) and self.report.rows_read == 1:
            self._check_column(error.column, raw)
        self._drop(str(error), raw.origin, self.report.bad)

    def _drop(self, message: str, origin: str, dropped: Dropped) -> None:
        if self._part.config.on_bad_row is OnBadRow.skip:
            dropped.add(message)
            self._writer.leave_out(origin, message.removeprefix(f"{origin}: "))
            return
        self._refused.append(message)
        if len(self._refused) == EXAMPLES:
            self._refuse()

    def _refuse(self) -> NoReturn:
        """Raise with the malformed rows that were found, the first of them."""
        found = self._refused
        if len(found) == 1:
            raise DataError(
                f"{found[0]}; mend the row, or set data.on_bad_row=skip to leave it out"
            )
        lines = "\n  ".join(found)
        more = " or more" if len(found) == EXAMPLES else ""
        raise DataError(
            f"{self._part.key}={self._part.path}: {len(found)}{more} malformed rows:\n  {lines}\n"
            "mend them, or set data.on_bad_row=skip to leave them out"
        )

    def _drop_untrained(self, row: Row, why: str) -> None:
        self._drop(f"{row.origin}: {why}", row.origin, self.report.untrained)

    def _check_column(self, column: str, first: RawRow) -> None:
        """Raise where no row has the column: then the format is wrong, not a row."""
        if any(column in raw.columns for raw in self._source.rows()):
            return
        config = self._part.config
        fitting = guess_formats(first.columns)
        hints = [f"data.format={name}" for name in fitting if name != config.format.value]
        hints.append(f"data.columns={{...: ...}}, which renames columns of {config.format.value}")
        raise DataError(
            f"{self._part.key}={self._part.path}: no row has the column {column!r} that "
            f"data.format={config.format.value} needs; {first.origin} has "
            f"{', '.join(first.columns)}; set {' or '.join(hints)}"
        )

    def _check_long(self) -> None:
        long, config = self.report.long, self._part.config
        if long.rows and config.on_long_row is OnLongRow.error:
            raise DataError(
                f"{self._part.key}={self._part.path}: {long.rows} of {self.report.rows_read} rows "
                f"are longer than data.max_length={config.max_length}, the longest "
                f"{self._longest} tokens; first: {', '.join(long.examples)}; set data.max_length="
                f"{self._longest}, or data.on_long_row=truncate or skip"
            )

    def _check_rows(self) -> None:
        name = f"{self._part.key}={self._part.path}"
        if self.report.rows_read == 0:
            raise DataError(f"{name} has no rows")
        if not self._writer.lengths:
            reasons = "; ".join(self.report.lines()[1:])
            raise DataError(f"{name}: none of {self.report.rows_read} rows can be used: {reasons}")


@dataclass(frozen=True)
class _Outcome:
    """What the first rank of a machine says to the others."""

    folder: str = ""
    error: str = ""
    kind: type[Exception] = RuntimeError
    """RuntimeError where it is not the user's mistake; then the rank that failed says what."""


def prepare_dataset(
    config: DataConfig, objective: Objective, *, which: str, fingerprint: str, world: World
) -> TokenDataset:
    """Tokenise ``which`` ("train" or "eval") part of the data, or find it in the cache.

    The first rank of each machine works, the others wait. ``fingerprint`` stands for the
    objective and its tokenizer.

    Raises:
        ConfigError: The data or the config is wrong; the same on all ranks.
    """
    works = world.local_rank == 0
    outcome = _Outcome(error="another rank failed while preparing the data" if works else "")
    failure: ConfigError | None = None
    try:
        if works:
            folder = _find_or_build(Part.of(config, which), objective, fingerprint)
            outcome = _Outcome(folder=str(folder))
    except ConfigError as error:
        failure = error
        kind = DataError if isinstance(error, DataError) else ConfigError
        outcome = _Outcome(error=str(error), kind=kind)
    finally:
        # Also where this rank fails for another reason, so that no rank waits for it.
        outcomes = world.gather(outcome)
    if failure is not None:
        raise failure
    for other in outcomes:
        if other.error:
            raise other.kind(other.error)
    dataset = load_dataset_folder(Path(outcomes[world.rank - world.local_rank].folder))
    assert dataset is not None, outcomes
    _check_same(dataset, which, world)
    for line in dataset.report.lines():
        log.info("%s data: %s", which, line)
    return dataset


def _check_same(dataset: TokenDataset, which: str, world: World) -> None:
    prints = world.gather(dataset.fingerprint)
    if len(set(prints)) > 1:
        key = "data.path" if which == "train" else "data.eval_path"
        raise DataError(f"{key} holds other data on some machines than on the first")


def _find_or_build(part: Part, objective: Objective, fingerprint: str) -> Path:
    """Folder of the tokenised data, in data.cache_dir."""
    source = part.open()
    try:
        key = _cache_key(part, source, fingerprint)
        cache = Path(part.config.cache_dir).expanduser() / "tokens"
        folder = cache / key[:32]
        if load_dataset_folder(folder) is None:
            _build(folder, part, source, objective)
        dataset = load_dataset_folder(folder)
        assert dataset is not None, folder
        check_share(part, dataset.report)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir={part.config.cache_dir}: tokenised data cannot be kept there: {error}"
        ) from error
    return folder


def check_share(part: Part, report: DataReport) -> None:
    """Raise DataError where more rows are malformed than data.max_bad_share allows."""
    limit = part.config.max_bad_share
    if report.rows_bad <= limit * report.rows_read:
        return
    share = report.rows_bad / report.rows_read
    lines = "\n  ".join([*report.bad.examples, *report.untrained.examples][:EXAMPLES])
    raise DataError(
        f"{part.key}={part.path}: {report.rows_bad} of {report.rows_read} rows ({share:.2%}) are "
        f"malformed, more than data.max_bad_share={limit:g} allows; the first:\n  {lines}\n"
        "mend them, or raise data.max_bad_share"
    )


def _cache_key(part: Part, source: Source, fingerprint: str) -> str:
    config = part.config
    parts = {
        "source": source.fingerprint(),
        "format": config.format.value,
        "columns": dict(config.columns),
        "max_length": config.max_length,
        "max_rows": part.max_rows,
        "on_bad_row": config.on_bad_row.value,
        "on_long_row": config.on_long_row.value,
        "objective": fingerprint,
        "code": hash_code(Path(__file__).parent),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _build(folder: Path, part: Part, source: Source, objective: Objective) -> None:
    """Write under another name, then rename: a folder under its name is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="partial-", dir=folder.parent))
    try:
        writer = DatasetWriter(partial)
        try:
            pass_over = _Tokenizing(part, source, objective, writer)
            pass_over.run()
            writer.finish(pass_over.report)
        finally:
            writer.close()
        _publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, folder: Path) -> None:
    """Rename; another machine on the same file system may have been first, with the same."""
    if folder.exists() and load_dataset_folder(folder) is None:
        shutil.rmtree(folder)
    try:
        os.rename(partial, folder)
    except OSError:
        if load_dataset_folder(folder) is None:
            raise
