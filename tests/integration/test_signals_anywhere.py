"""A signal at any point of a run: saved once, agreed by all ranks, and the run goes on later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dtune_launch.local import start_job
from dtune_launch.spec import JobSpec

from dtune.cli import main
from dtune.run_folder import start_run_folder
from dtune.runtime import signals
from dtune.runtime.signals import Preempted, StopRequest
from dtune.runtime.status import State, Status, read_status, write_status
from tests.distributed.pool import Pool
from tests.faults.guard_runs import digest
from tests.integration.train_runs import Assembled, assembled, held_out, kept, settings

EX_TEMPFAIL = 75
STEPS = 6
COMMON = ("train.max_steps=6", "checkpoint.every=4", "train.eval_every=3", "peft.dropout=0.1")


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """pytest gets its signals back."""
    handlers = {number: signal.getsignal(number) for number in signals.SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def before_call(owner: Any, name: str, calls: int, act: Callable[[], None]) -> None:
    """Act before one of the calls of a method, counted from 1."""
    method, seen = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] == calls:
            act()
        return method(*args, **kwargs)

    setattr(owner, name, wrapped)


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


TERM, USR1 = send(signal.SIGTERM), send(signal.SIGUSR1)

POINTS: dict[str, tuple[Callable[[Assembled], tuple[Any, str]], int, int]] = {
    "first step": (lambda it: (it.trainer.engine, "backward"), 1, 1),
    "mid-step": (lambda it: (it.trainer.engine, "clip"), 3, 3),
    "in a save": (lambda it: (it.trainer.checkpointer, "_snapshot"), 1, 3),
    "in evaluation": (lambda it: (it.trainer.evaluator, "_match"), 1, 3),
    "last step": (lambda it: (it.trainer.engine, "step"), STEPS, STEPS),
    "last evaluation": (lambda it: (it.trainer.evaluator, "_match"), 2, STEPS),
}
"""Where a signal comes: a method and its call; and the step at which it is to be saved."""


def run(folder: Path, inject: Callable[[Assembled], None] | None = None) -> tuple[State, str]:
    more = (held_out(folder.parent, rows=4), "evaluate.generate=true", "evaluate.max_new_tokens=2")
    with assembled(settings(folder, *COMMON, *more, "resume=auto")) as it:
        if inject is not None:
            inject(it)
        state = it.trainer.fit(evaluate_before=False)
        progress = it.trainer.progress
        best = f"{progress.best_step} {progress.best_value!r} {progress.evaluations_without_gain}"
        return state, f"{digest(it.trainer.engine.state())} best {best}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The state that a run ends with which nothing interrupts."""
    return run(tmp_path_factory.mktemp("whole") / "run")[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("point", POINTS)
def test_a_signal_saves_the_step_it_came_in_and_nothing_is_lost(
    tmp_path: Path, whole: str, point: str, number: signal.Signals
) -> None:
    where, call, step = POINTS[point]

    def inject(it: Assembled) -> None:
        before_call(*where(it), call, send(number))

    assert run(tmp_path / "run", inject)[0] is State.preempted
    assert kept(tmp_path / "run")[-1] == step
    assert kept(tmp_path / "run").count(step) == 1
    assert run(tmp_path / "run") == (State.done, whole)


def test_an_evaluation_that_is_broken_off_counts_as_none(tmp_path: Path) -> None:
    more = (held_out(tmp_path, rows=4), "train.early_stopping=1")
    with assembled(settings(tmp_path / "run", *COMMON, *more)) as it:
        asked: list[bool] = []
        evaluator: Any = it.trainer.evaluator

        def evaluate(engine: Any, asks_to_stop: Callable[[], bool]) -> dict[str, float]:
            TERM()
            asked.append(asks_to_stop())
            return dict(evaluator(engine, asks_to_stop))

        it.trainer.evaluator = evaluate
        assert it.finish()[0] is State.preempted
        assert asked == [True]
        progress = it.trainer.progress
        assert (progress.best_step, progress.last_evaluated_step) == (-1, -1)
        assert progress.evaluations_without_gain == 0


def test_a_second_signal_begins_no_further_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", 0.0)

    def twice() -> None:
        TERM()
        time.sleep(0.01)
        USR1()

    with assembled(settings(tmp_path / "run", "train.max_steps=6", "checkpoint.every=2")) as it:
        before_call(it.trainer.engine, "clip", 3, twice)
        assert it.finish()[0] is State.preempted
    assert kept(tmp_path / "run") == [2]


def test_what_comes_at_once_from_scheduler_and_launcher_is_one_request() -> None:
    stop = StopRequest()
    stop.install()
    TERM()
    TERM()
    assert (stop.signal_name, stop.urgency) == ("SIGTERM", 1)


def stop_on_one_rank(world: Any, *, overrides: list[str], rank: int) -> tuple[str, int, bool]:
    with assembled(overrides, world) as it:
        if world.rank == rank:
            before_call(it.trainer.engine, "clip", 2, USR1)
        state, _ = it.finish()
        return state.value, it.trainer.progress.step, it.trainer.stop.is_set


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path, two_ranks: Pool) -> None:
    ended = two_ranks.run(
        "tests.integration.test_signals_anywhere:stop_on_one_rank",
        overrides=settings(tmp_path / "run", "parallel=ddp"),
        rank=1,
    )
    assert ended == [("preempted", 2, False), ("preempted", 2, True)]
    assert kept(tmp_path / "run") == [2]


def test_before_there_is_anything_to_save_a_signal_ends_the_process_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    write_status(tmp_path, Status(State.running))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "LATEST").write_text("step-00000012\n")
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest().in_charge() as stop:
        stop.install(at_once=True, run_dir=tmp_path)
        with pytest.raises(Preempted) as raised:
            TERM()
    assert raised.value.code == EX_TEMPFAIL
    status = read_status(tmp_path)
    assert (status.state, status.step) == (State.preempted, 12)
    assert signal.getsignal(signal.SIGTERM) is before
    # A rank that has lost this one fails; that is not how the run ended.
    write_status(tmp_path, Status(State.failed, rank=1, message="connection closed by peer"))
    assert read_status(tmp_path).state is State.preempted


_STUCK = """
import ctypes, sys
from dtune.runtime import signals
signals.GRACE_SECONDS = 0.2
stop = signals.StopRequest()
stop.install(at_once=True, run_dir=sys.argv[1])
print("ready", flush=True)
# Waits without letting Python run, whatever signal comes.
ctypes.CDLL(None).system(b"exec sleep 20 > /dev/null")
"""


def test_a_process_that_waits_in_a_library_leaves_too(tmp_path: Path) -> None:
    write_status(tmp_path, Status(State.running))
    command = [sys.executable, "-c", _STUCK, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == EX_TEMPFAIL
        assert time.monotonic() - began < 15
    assert read_status(tmp_path).state is State.preempted


def has_handler(pid: int, number: signal.Signals) -> bool:
    """Whether a process would not die of a signal."""
    text = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in text.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.slow
def test_signals_while_python_starts_and_imports_are_not_lost(tmp_path: Path) -> None:
    from dtune.config.compose import compose_overrides
    from dtune.config.freeze import load_frozen

    early = tmp_path / "early"
    overrides = settings(early)
    text = compose_overrides("train", overrides)
    start_run_folder(load_frozen(text), text, command=["dtune", "train", *overrides])
    # Before its first instruction: it is blocked until the rank takes the signals over.
    job = start_job(JobSpec("dtune.worker", (str(early),), early, 1), subprocess.DEVNULL)  # type: ignore[arg-type]
    job.send_signal(signal.SIGTERM)

    late = tmp_path / "late"
    command = [sys.executable, "-m", "dtune", "train", *settings(late)]
    train = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not has_handler(train.pid, signal.SIGUSR1):
        assert train.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    train.send_signal(signal.SIGUSR1)
    said = train.communicate(timeout=120)[1]
    assert train.returncode == EX_TEMPFAIL, said
    assert "stopped by SIGUSR1" in said
    assert job.wait(timeout=120) == EX_TEMPFAIL
    assert read_status(early).state is State.preempted
    # Nothing is in the way of the same command.
    assert main(["train", *settings(early), "resume=auto"]) == 0


_PASSES_ON = """
import os, sys, time
from dtune.runtime import signals
from dtune_launch.local import forwarding_signals
signals.GRACE_SECONDS = 0.2
with signals.StopRequest().in_charge():
    with forwarding_signals([]) as received:
        os.kill(os.getpid(), int(sys.argv[1]))
        # Its processes take their time to save.
        time.sleep(1.0)
        print("alive", [int(number) for number in received], flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_who_passes_a_signal_on_waits_for_those_who_save(number: signal.Signals) -> None:
    command = [sys.executable, "-c", _PASSES_ON, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"alive [{int(number)}]\n", done.stderr
