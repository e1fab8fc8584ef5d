"""Logging: every rank to its own file, the first rank to the terminal as well."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

log = logging.getLogger("dtune")


class RankFile(logging.FileHandler):
    """The log file of a rank."""

    _is_failing = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say once that records do not get to the file: it ends no run, a checkpoint would."""
        if not self._is_failing:
            self._is_failing = True
            sys.stderr.write(f"dtune: {self.baseFilename} lacks lines: {sys.exception()}\n")


def log_to_file(text: str) -> None:
    """Write to the file of this rank alone: what a terminal has no room for."""
    record = log.makeRecord(log.name, logging.INFO, __file__, 0, text, (), None)
    for handler in log.handlers:
        if isinstance(handler, RankFile):
            handler.handle(record)


def start_logging(rank: int, folder: Path | None) -> None:
    """Send dtune's records to the terminal (first rank) and to ``folder/rank-<n>.log``."""
    log.handlers.clear()
    log.setLevel(logging.INFO)
    log.propagate = False
    # When imported, it warns of a CPU kernel that it did not find, and that dtune does not use.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if rank == 0:
        terminal = logging.StreamHandler(sys.stderr)
        terminal.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(terminal)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = RankFile(folder / f"rank-{rank}.log", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(file)
