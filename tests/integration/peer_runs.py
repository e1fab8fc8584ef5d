"""Contestants of benchmarks/peers, run in this process."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.contestants import find
from benchmarks.peers.inputs import make_inputs
from benchmarks.peers.measure import run_entry
from benchmarks.peers.options import SETTINGS, parse
from benchmarks.peers.run import same_work
from benchmarks.peers.work import Entry, Work
from dtune.bench.record import CaseResult, Measured

SMALL = "model=tiny rounds=1 warmup=2 steps=2 length=64 threads=1".split()


def prepared(folder: Path, *settings: str) -> Work:
    """Work that is ready to be done: documents share a row, and micro batches a step."""
    options = parse([*SMALL, "documents=4", "accumulation=2", *settings])
    work = options.work("tiny", folder, has_gpu=options.device == "cuda")
    make_inputs(work)
    return work


def side_by_side(work: Work, setting: str, *names: str) -> list[Measured]:
    """The numbers of contestants that do the work, which is the same by their losses."""
    rows: list[CaseResult] = []
    for name in names:
        row = run_entry(Entry(name, SETTINGS[setting], work), find(name))
        rows.append(same_work(row, rows))
    assert [row.reason for row in rows] == [""] * len(names)
    return [row.measured for row in rows if row.measured is not None]
