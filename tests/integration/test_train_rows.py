"""What a run writes down: the same numbers, in full precision, wherever they go."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import termios
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dtune.data.loader import Loader
from dtune.runtime.logs import start_logging
from dtune.runtime.schema import LogConfig
from dtune.runtime.world import World
from dtune.train.sinks.base import Row
from dtune.train.sinks.build import build_sinks
from dtune.train.sinks.jsonl import JsonlSink, read_metrics
from dtune.train.sinks.progress import LineSink
from tests.integration.train_runs import assembled, column, held_out, settings

STEPS, WARMUP, LR, FLOOR = 6, 2, 3e-3, 0.1


@dataclass(frozen=True)
class Recorded:
    """A run that was logged everywhere."""

    run_dir: Path
    rows: list[Row]
    """As the trainer gave them."""
    loader: Loader


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    folder = tmp_path_factory.mktemp("recorded")
    overrides = settings(
        folder / "run",
        held_out(folder),
        f"train.max_steps={STEPS}",
        "train.eval_every=3",
        f"schedule.warmup_steps={WARMUP}",
        f"schedule.min_factor={FLOOR}",
        f"optim.lr={LR}",
        "log.tensorboard=true",
        "log.wandb=true",
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        # No key anywhere, and a proxy that nothing answers at: sending would fail.
        patch.setenv("HOME", str(folder))
        patch.setenv("NETRC", str(folder / "netrc"))
        for proxy in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            patch.setenv(proxy, "http://127.0.0.1:9")
        with assembled(overrides) as it:
            it.finish()
            yield Recorded(folder / "run", it.memory.rows, it.trainer.loader)


def train_rows(recorded: Recorded) -> list[Row]:
    return [row for row in recorded.rows if row["kind"] == "train"]


def test_every_step_has_a_row_with_what_scripts_read(recorded: Recorded) -> None:
    rows = train_rows(recorded)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    named = {"loss", "lr", "grad_norm", "tokens", "tokens_per_second"}
    assert all(named <= row.keys() for row in rows)
    assert all(math.isfinite(float(row[name])) for row in rows for name in named)
    evaluated = [row["step"] for row in recorded.rows if row["kind"] == "eval"]
    assert evaluated == [3, 6]


def test_the_file_has_the_rows_bit_for_bit(recorded: Recorded) -> None:
    path = recorded.run_dir / "metrics.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == recorded.rows
    assert read_metrics(path) == recorded.rows
    # What fewer digits would have lost.
    losses = column(train_rows(recorded), "loss")
    assert [float(f"{loss:.6g}") for loss in losses] != losses


def test_counts_are_those_of_the_batches(recorded: Recorded) -> None:
    for row in train_rows(recorded):
        batches = recorded.loader.batches(int(row["step"]) - 1)
        assert row["tokens"] == sum(batch.num_tokens for batch in batches)
        assert row["targets"] == sum(batch.num_targets for batch in batches)
        assert row["slots"] == sum(batch.num_slots for batch in batches)
    # The three differ, so that none can stand for another.
    sums = [sum(column(train_rows(recorded), name)) for name in ("targets", "tokens", "slots")]
    assert 0 < sums[0] < sums[1] < sums[2]


def test_the_rate_is_that_of_the_schedule(recorded: Recorded) -> None:
    rising = [LR * step / (WARMUP + 1) for step in range(1, WARMUP + 1)]
    course = [math.cos(math.pi * part / 3) for part in range(4)]
    falling = [LR * (FLOOR + (1 - FLOOR) * 0.5 * (1 + value)) for value in course]
    # The factors are computed in another order: a few roundings of double precision.
    assert column(train_rows(recorded), "lr") == pytest.approx([*rising, *falling], rel=1e-14)


def test_tensorboard_has_the_same_numbers(recorded: Recorded) -> None:
    events = EventAccumulator(str(recorded.run_dir / "tensorboard"))
    events.Reload()
    for kind, name in (("train", "loss"), ("train", "grad_norm"), ("eval", "loss")):
        wanted = [(r["step"], r[name]) for r in recorded.rows if r["kind"] == kind]
        found = events.Scalars(f"{kind}/{name}")
        assert [event.step for event in found] == [step for step, _ in wanted]
        # Event files hold fp32, which is what a loss of training is.
        values = [value for _, value in wanted]
        assert [event.value for event in found] == pytest.approx(values, rel=2**-24)


def test_wandb_has_the_same_numbers_without_a_key_or_a_network(recorded: Recorded) -> None:
    (file,) = (recorded.run_dir / "wandb").glob("wandb/offline-run-*/run-*.wandb")
    data = file.read_bytes()
    # A log of records that hold numbers as JSON, in the order in which they came.
    losses = column(train_rows(recorded), "loss")
    found = [data.find(json.dumps(loss).encode()) for loss in losses]
    assert min(found) > 0
    assert found == sorted(found)
    assert data.find(json.dumps(2 * losses[0]).encode()) == -1


def test_one_line_a_step_off_a_terminal(
    recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    start_logging(0, None)
    sink = LineSink(STEPS, 1)
    for row in recorded.rows:
        sink.write(row)
    lines = capsys.readouterr().err.splitlines()
    shown = [line for line in lines if line.startswith("step")]
    assert [line.split(" | ")[0] for line in shown] == [f"step {n}/6" for n in range(1, 7)]
    for part in ("loss", "lr", "norm", "tokens/s", "GiB", "left"):
        assert all(part in line for line in shown), part
    assert [line.split(" | ")[0] for line in lines if line not in shown] == [
        "eval at step 3",
        "eval at step 6",
    ]


DRAW = """
from dtune.runtime.schema import Progress
from dtune.train.sinks.progress import BarSink, wants_bar
bar = BarSink(3, 0)
bar.write({"kind": "train", "step": 2, "loss": 1.25, "grad_norm": 0.5, "tokens_per_second": 9.0})
bar.write({"kind": "eval", "step": 2, "loss": 1.5})
bar.close()
print(*(int(wants_bar(progress)) for progress in (Progress.auto, Progress.bar, Progress.lines)))
"""


def test_a_bar_is_drawn_on_a_terminal_only() -> None:
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    env = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")}
    wanted = []
    for stream in (theirs, subprocess.DEVNULL):
        done = subprocess.run(
            [sys.executable, "-c", DRAW], stdout=subprocess.PIPE, stderr=stream, env=env, check=True
        )
        wanted.append(done.stdout.split())
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    os.close(ours)
    assert wanted == [[b"1", b"1", b"0"], [b"0", b"1", b"0"]]
    assert "2/3" in shown
    assert "loss 1.2500" in shown
    assert "eval at step 2 | loss 1.5000" in shown


def test_ranks_but_the_first_write_nothing(tmp_path: Path) -> None:
    everything = LogConfig(tensorboard=True, wandb=True)
    second = World(1, 2, 1, 2, device=None, host=None)  # type: ignore[arg-type]
    assert build_sinks(everything, tmp_path, second, start_step=0, total_steps=3, settings={}) == []
    assert list(tmp_path.iterdir()) == []


def row_of(step: int, loss: float) -> Row:
    return {"kind": "train", "step": step, "loss": loss}


def test_rows_of_a_resumed_run_replace_those_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlSink(path)
    for step in range(1, 5):
        first.write(row_of(step, 1.0))
    first.close()
    second = JsonlSink(path)
    second.write({"kind": "resume", "step": 2})
    for step in range(3, 6):
        second.write(row_of(step, 2.0))
    second.close()
    rows = [row for row in read_metrics(path) if row["kind"] == "train"]
    assert [(row["step"], row["loss"]) for row in rows] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
        (4, 2.0),
        (5, 2.0),
    ]


def test_half_a_line_of_a_killed_run_is_neither_read_nor_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = json.dumps(row_of(1, 1.0)) + "\n"
    path.write_text(whole + whole[:20])
    assert read_metrics(path) == [row_of(1, 1.0)]
    sink = JsonlSink(path)
    sink.write(row_of(2, 1.0))
    sink.close()
    assert read_metrics(path) == [row_of(1, 1.0), row_of(2, 1.0)]
