"""One process of the comparison: ``python -m benchmarks.peers.worker ENTRY.json RESULT.json``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers.contestants import find
from benchmarks.peers.work import read_entry


def main(argv: Sequence[str]) -> int:
    """Do the work of one entry and write what it came to."""
    entry_file, result_file = map(Path, argv)
    entry = read_entry(entry_file)
    contestant = find(entry.peer)
    for module in contestant.FIRST:
        importlib.import_module(module)
    # After what must come before transformers.
    from benchmarks.peers.measure import run_entry
    from dtune.bench.record import to_json

    result_file.write_text(to_json(run_entry(entry, contestant)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
