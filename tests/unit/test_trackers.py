"""Trackers: whatever they do, no row is waited for and none is missing from metrics.jsonl."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from dtune.errors import CheckpointError
from dtune.runtime.schema import LogConfig, WandbMode
from dtune.runtime.status import State
from dtune.runtime.world import World
from dtune.train.sinks import background
from dtune.train.sinks.background import BackgroundSink
from dtune.train.sinks.base import Row
from dtune.train.sinks.build import build_sinks, close_sinks, report_trackers
from dtune.train.sinks.jsonl import read_metrics
from dtune.train.sinks.trackers import WandbSink
from dtune.train.trainer import Trainer
from tests.integration.train_runs import assembled, settings

LONGEST_SECONDS = 1e-3
"""Of a step, that a tracker may take for a row."""

ROWS: list[Row] = [{"kind": "train", "step": step, "loss": 1.0 / step} for step in range(1, 9)]


@dataclass
class Tracker:
    """Takes rows until it is told to fail, or waits to be let go on."""

    fails_at: tuple[int, ...] = ()
    waits: threading.Event | None = None
    rows: list[Row] = field(default_factory=list)
    closed: bool = False

    def write(self, row: Row) -> None:
        if self.waits is not None:
            assert self.waits.wait(60)
        if row["step"] in self.fails_at:
            raise KeyError("a tracker may raise anything")
        self.rows.append(row)

    def close(self) -> None:
        self.closed = True


def taken_by(tracker: Tracker) -> BackgroundSink:
    sink = BackgroundSink("tracker", lambda: tracker)
    for row in ROWS:
        sink.write(row)
    return sink


def test_a_tracker_that_works_has_every_row_in_order(caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker()
    sink = taken_by(tracker)
    sink.close()
    assert tracker.rows == ROWS
    assert tracker.closed
    assert (sink.report().dropped, sink.report().error) == (0, "")
    assert caplog.records == []


def test_rows_that_a_tracker_refuses_are_counted_and_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker = Tracker(fails_at=(2, 5))
    sink = taken_by(tracker)
    sink.close()
    assert [row["step"] for row in tracker.rows] == [1, 3, 4, 6, 7, 8]
    assert tracker.closed
    assert sink.report().dropped == 2
    assert "KeyError" in sink.report().error
    told = [record.getMessage() for record in caplog.records]
    assert len([line for line in told if "KeyError" in line]) == 1


def test_a_tracker_that_fails_again_and_again_is_given_up() -> None:
    tracker = Tracker(fails_at=tuple(range(2, 9)))
    sink = taken_by(tracker)
    sink.close()
    assert [row["step"] for row in tracker.rows] == [1]
    assert sink.report().dropped == 7


def test_a_tracker_that_cannot_be_made_drops_everything() -> None:
    def make() -> Tracker:
        raise OSError("no route to the server")

    sink = BackgroundSink("tracker", make)
    for row in ROWS:
        sink.write(row)
    sink.close()
    assert sink.report().dropped == len(ROWS)
    assert sink.report().error == "OSError: no route to the server"


def test_a_tracker_that_hangs_is_waited_for_neither_in_a_step_nor_for_long_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(background, "MAX_WAITING", 3)
    go_on = threading.Event()
    began = time.monotonic()
    tracker = Tracker(waits=go_on)
    sink = taken_by(tracker)
    # One at most is with the tracker, three wait.
    assert sink.report().dropped >= len(ROWS) - 4
    sink.close_seconds = 0.2
    sink.close()
    assert time.monotonic() - began < 30
    assert sink.report().dropped >= len(ROWS) - 1
    go_on.set()


@pytest.mark.parametrize("kind", ["works", "fails", "hangs"])
def test_a_row_takes_a_step_less_than_a_millisecond_whatever_the_tracker_does(kind: str) -> None:
    go_on = threading.Event()
    count = 3 * background.MAX_WAITING
    fails_at = tuple(range(count)) if kind == "fails" else ()
    tracker = Tracker(fails_at=fails_at, waits=go_on if kind == "hangs" else None)
    sink = BackgroundSink("tracker", lambda: tracker)
    seconds = []
    for step in range(count):
        began = time.perf_counter()
        sink.write({**ROWS[0], "step": step})
        seconds.append(time.perf_counter() - began)
    go_on.set()
    sink.close_seconds = 1.0
    sink.close()
    # 1 % of a step of 0.1 s; measured: 0.01 ms.
    assert statistics.median(seconds) < LONGEST_SECONDS


def test_tensorboard_without_a_folder_to_write_to_costs_no_row_of_metrics(
    tmp_path: Path, world: World
) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    sinks = build_sinks(
        LogConfig(tensorboard=True), tmp_path, world, start_step=0, total_steps=8, settings={}
    )
    row = {"lr": 1.0, "grad_norm": 1.0, "tokens_per_second": 1.0, "peak_memory_gib": 0.0}
    for given in ROWS:
        for sink in sinks:
            sink.write({**given, **row})
    close_sinks(sinks, seconds=60.0)
    (report,) = report_trackers(sinks)
    assert report.dropped == len(ROWS)
    assert "FileExistsError" in report.error or "NotADirectoryError" in report.error
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 9))


def test_a_run_that_fails_waits_a_moment_for_a_tracker_that_hangs_and_says_why_it_failed(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Trainer, *, evaluate_before: bool) -> State:
        raise MemoryError("a fault of the test")

    class Full:
        """Rows that a full disk did not take."""

        def write(self, row: Row) -> None:
            """Nothing is taken."""

        def close(self) -> None:
            raise CheckpointError("metrics.jsonl: no space (ENOSPC)")

    monkeypatch.setattr(Trainer, "_fit", fails)
    go_on = threading.Event()
    hangs = taken_by(Tracker(waits=go_on))
    with assembled(settings(tmp_path / "run", "train.max_steps=1"), world) as it:
        # Others wait to be told.
        it.trainer.world = replace(world, size=2)
        it.trainer.sinks = [Full(), hangs]
        began = time.monotonic()
        with pytest.raises(MemoryError, match="a fault of the test"):
            it.trainer.fit(evaluate_before=False)
        took = time.monotonic() - began
    go_on.set()
    assert "it did not end within 1 s" in hangs.report().error
    assert took < 30


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_wandb_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for attempt in range(2):
        sink = WandbSink(
            tmp_path / "wandb", project="test", mode=WandbMode.offline, config={"attempt": attempt}
        )
        sink.write(ROWS[attempt])
        sink.close()
    kept = (tmp_path / "wandb" / "run-id").read_text()
    folders = sorted((tmp_path / "wandb" / "wandb").glob("offline-run-*"))
    assert len(folders) >= 1
    # The second in one second has a number behind.
    assert all(re.fullmatch(rf"offline-run-\d+_\d+-{kept}(-\d+)?", f.name) for f in folders)
    files = [file for folder in folders for file in folder.glob("*.wandb")]
    assert {file.name for file in files} == {f"run-{kept}.wandb"}


_DEAD_SERVER = """
import json, statistics, sys, time
from functools import partial
from pathlib import Path
from dtune.runtime.schema import WandbMode
from dtune.train.sinks.background import BackgroundSink
from dtune.train.sinks.trackers import WandbSink

make = partial(WandbSink, Path(sys.argv[1]), project="p", mode=WandbMode.online, config={})
sink = BackgroundSink("wandb", make)
seconds = []
for step in range(100):
    began = time.perf_counter()
    sink.write({"kind": "train", "step": step, "loss": 1.0})
    seconds.append(time.perf_counter() - began)
sink.close_seconds = 1.0
sink.close()
said = {"writing": statistics.median(seconds), "dropped": sink.report().dropped}
print(json.dumps(said), flush=True)
"""


@pytest.mark.slow
def test_a_wandb_server_that_is_not_there_keeps_no_run_from_going_on_or_ending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    # The port that is reserved for discarding: nobody listens.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_SILENT", "true")
    done = subprocess.run(
        [sys.executable, "-c", _DEAD_SERVER, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["dropped"] == 100
    assert said["writing"] < LONGEST_SECONDS
